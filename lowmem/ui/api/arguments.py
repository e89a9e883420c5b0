"""The description of each argument of the named endpoints, for `gradio_client`'s users and for the schemas of MCP tools."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.quant import METHODS

RENAMED_ARGUMENTS = {"kv": "cache_type", "answers": "num_return_sequences"}
"""Deprecated argument -> current one. Deprecated ones work for one release; they come after all others."""

ARGUMENTS = {
    **{old: f"deprecated name of {new}." for old, new in RENAMED_ARGUMENTS.items()},
    "model": 'the model: "demo", a hub id, a folder or a .gguf file.',
    "models": "names of models, each as for the argument model of other tools.",
    "precision": 'what weights are loaded in: "auto", "fp32", "bf16", "fp16", "int8", "bnb8" or "nf4"; of a graph "fp32", "fp16", "int8" or "int4".',
    "context": "tokens of prompt and answer that memory is planned for.",
    "device": '"auto", "cpu", "cuda:0" or "mps".',
    "cache_type": 'how keys and values are stored: "same" as the computation, "int8", "int4", "int2", or "ram" on a GPU.',
    "ram": 'RAM budget such as "4G"; empty for all free memory.',
    "vram": 'GPU memory budget such as "6G"; empty for all free memory.',
    "gpu": 'a card such as "t4", "3060", "rtx-a2000" or "h100"; empty for any GPU with `vram`.',
    "force": "load even if the estimate is over the budget.",
    "embedding_bits": "bits of embedding and output head: 8, 6 or 4, or 16 to leave them as they are.",
    "restart": "delete an unfinished quantization that cannot be resumed, and start over.",
    "prompt": "the text to continue.",
    "options": "options by name, those of the command line with underscores; the rest keep their defaults.",
    "raw": "continue the text as it is, without the chat template.",
    "message": "the user's message.",
    "history": 'earlier messages, oldest first, each {"role": "user" or "assistant", "content": text}.',
    "system": "how the model should behave; empty for no system prompt.",
    "prompts": "a list of texts.",
    "batch_size": "prompts in parallel; 0 for as many as the budget allows.",
    "method": f"one of {', '.join(METHODS)}.",
    "methods": 'names of methods, or a mapping of names to settings such as {"rtn": {"bits": [3, 4], "group_size": 64}}.',
    "bits": "bits per weight: 2, 3, 4 or 8.",
    "group_size": "weights that share a scale; -1 for a whole row.",
    "symmetric": "without zero points.",
    "calibration": 'calibration text: "manual", "wikitext2", "c4", or a text file beside the app.',
    "samples": "number of calibration samples.",
    "sequence_length": "tokens per calibration sample.",
    "variants": 'a list of precisions and METHOD:BITS:GROUP, such as ["fp32", "int8", "gptq:4:64"].',
    "precisions": 'a list of precisions to load the original in, such as ["fp32", "int8"].',
    "text": 'a text; where quality is measured, the name of one: "manual", "wikitext2" or "c4".',
    "address": 'instead of a text, its address (https://...), or "manual", "wikitext2" or "c4".',
    "workers": "most cells in parallel; 0 for as many as fit the budget.",
    "window": "recent tokens that attention sees.",
    "stride": "tokens that the window moves on.",
    "sinks": "first tokens of the text that stay in the cache.",
    "layers": "a list of layers: 0 for the embeddings, i for the output of block i, -1 for the last.",
    "format": 'of hidden states "npy" or "safetensors"; of an export "onnx" or "tensorrt".',
    "new_tokens": "tokens to generate.",
    "disk_blocks": 'blocks that stay on disk, a list like "0-5,9" or "all"; empty as the budget allows.',
    "ram_blocks": 'blocks that stay in RAM, a list like "0-5,9" or "all"; empty as the budget allows.',
    "num_return_sequences": "sequences generated in parallel; 0 for automatic.",
    "again": "measure this machine again instead of using the stored rates.",
    "original": "the model that a quantized checkpoint was made from; empty where there is none.",
    "key": 'the entry to delete, as /stored names it, such as "models/demo".',
    "folder": "the folder of an earlier result, from its receipt's details.",
    "repo": "the repository, your-name/your-model.",
    "token": "a hub token with write access, used for this push only; empty for the owner's.",
    "private": "make the repository private.",
}

SPECIAL = {
    ("plan_for", "vram"): 'memory of the GPU such as "6G"; empty for that of the card.',
    ("plan_for", "ram"): 'RAM of the machine such as "32G"; empty for 16 GB.',
    ("what_runs", "ram"): 'RAM of the machines such as "32G"; empty for 16 GB.',
    ("perplexity", "stride"): "tokens that the window moves on; 0 reads the text once, through the cache.",
    ("perplexity", "text"): "the text itself.",
    ("hidden_states", "text"): "the text itself.",
    ("compare_strategies", "text"): "the text itself; the tail of Python's manual when left out.",
    ("offload_compare", "methods"): "names of offloading methods; all of them when left out.",
}
"""Where an argument means something of its own: (endpoint, argument)."""


def described(endpoint: str, doc: str, arguments: Sequence[str]) -> str:
    """An endpoint's docstring with its arguments, one a line, as gradio reads it."""
    lines = [f"    {name}: {SPECIAL.get((endpoint, name)) or ARGUMENTS.get(name, '')}" for name in arguments]
    return "\n".join([doc, "", "Args:", *lines] if lines else [doc])
