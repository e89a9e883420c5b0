"""What each argument of a named endpoint means, said once: for `gradio_client`'s users, and for the schemas of MCP tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lowmem.quant import METHODS

ARGUMENTS = {
    "model": 'the model: "demo", a hub id, a folder or a .gguf file.',
    "models": "names of models, each as for the argument model of other tools.",
    "precision": 'what weights are loaded in: "auto", "fp32", "bf16", "fp16", "int8", "bnb8" or "nf4"; of a graph "fp32", "fp16", "int8" or "int4".',
    "context": "tokens of prompt and answer together that memory is planned for.",
    "device": '"auto", "cpu", "cuda:0" or "mps".',
    "kv": 'how keys and values are stored: "same" as the computation, "int8", "int4", "int2", or "ram" on a GPU.',
    "ram": 'RAM budget such as "4G"; empty is all that is free.',
    "vram": 'GPU memory budget such as "6G"; empty is all that is free.',
    "force": "go on although the prediction is over the budget.",
    "prompt": "the text to continue.",
    "options": "options by name, those of the command line with underscores; what is left out stays as usual.",
    "raw": "continue the text as it is, without the chat template.",
    "message": "what the user says.",
    "history": 'earlier messages, oldest first, each {"role": "user" or "assistant", "content": text}.',
    "system": "how the model should behave; empty for nothing.",
    "prompts": "a list of texts.",
    "batch_size": "prompts at once; 0 takes what the budget allows.",
    "method": f"one of {', '.join(METHODS)}.",
    "methods": 'names of methods, or a mapping of names to settings such as {"rtn": {"bits": [3, 4], "group_size": 64}}.',
    "bits": "width of a stored weight: 2, 3, 4 or 8.",
    "group_size": "weights that share a scale; -1 is a whole row.",
    "symmetric": "no zero points.",
    "calibration": 'text that the model reads while it is quantized: "manual", "wikitext2", "c4", or a text file beside the app.',
    "samples": "samples of the calibration text.",
    "sequence_length": "tokens of a sample.",
    "variants": 'a list of precisions and METHOD:BITS:GROUP, such as ["fp32", "int8", "gptq:4:64"].',
    "precisions": 'a list of precisions to load the original in, such as ["fp32", "int8"].',
    "text": 'a text; where quality is measured the name of one: "manual", "wikitext2" or "c4".',
    "address": 'in place of a text: where it is, https://..., or "manual", "wikitext2" or "c4".',
    "workers": "most cells side by side; 0 for as many as fit the budget.",
    "window": "latest tokens that are seen at once.",
    "stride": "tokens that the window moves on.",
    "sinks": "first tokens that stay although they have left the window.",
    "layers": "a list of layers: 0 the embeddings, i after block i, -1 the last.",
    "format": 'of hidden states "npy" or "safetensors"; of an export "onnx" or "tensorrt".',
    "new_tokens": "tokens to write.",
    "disk_blocks": 'blocks that stay on disk, a list like "0-5,9" or "all"; empty as the budget allows.',
    "ram_blocks": 'blocks that stay in RAM, a list like "0-5,9" or "all"; empty as the budget allows.',
    "answers": "sequences at once; 0 for as many as pay.",
    "again": "measure this machine anew, and do not take the rates that were measured before.",
    "key": 'what is deleted, as /stored names it, such as "models/demo".',
    "folder": "a folder that an earlier action made; its receipt's details name it.",
    "repo": "the repository, your-name/your-model.",
    "token": "a token of the hub that may write; used for this push only. Empty takes the owner's.",
    "private": "make the repository a private one.",
}

SPECIAL = {
    ("perplexity", "stride"): "tokens that the window moves on; 0 reads the text once, through the cache.",
    ("perplexity", "text"): "the text itself.",
    ("hidden_states", "text"): "the text itself.",
    ("exercise", "text"): "the text itself; the tail of Python's manual when left out.",
    ("offload_compare", "methods"): "names of ways to offload; all of them when left out.",
}
"""Where an argument means something of its own: (endpoint, argument)."""


def documented(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, with its arguments described in its docstring, one a line, as gradio reads it."""
    names = inspect.signature(action).parameters
    told = {name: SPECIAL.get((action.__name__, name)) or ARGUMENTS.get(name, "") for name in names}
    lines = [f"    {name}: {text}" for name, text in told.items()]
    action.__doc__ = "\n".join([inspect.getdoc(action) or "", "", "Args:", *lines] if lines else [action.__doc__ or ""])
    return action
