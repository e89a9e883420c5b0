"""Labels of the page, by key."""

from __future__ import annotations

from typing import Any

from lowmem.messages import msg

NAMES: dict[str, Any] = {
    "shares": {
        "weights": msg("Weights"),
        "kv": msg("KV cache"),
        "activations": msg("Activations"),
        "scratch": msg("Scratch"),
        "overhead": msg("Runtime"),
        "free": msg("Free"),
    },
    "memory": {"ram": msg("RAM"), "vram": msg("GPU memory")},
    "limits": {
        "the disk": msg("{seconds} per token, limited by the disk"),
        "the bus": msg("{seconds} per token, limited by the bus"),
        "the computation": msg("{seconds} per token, limited by computation"),
    },
    "verdicts": {"fits": msg("Fits"), "tight": msg("Tight"), "over": msg("Doesn't fit")},
    "choices": {
        "same": msg("Same as the model"),
        "int8": msg("int8"),
        "int4": msg("4 bits"),
        "int2": msg("2 bits"),
        "ram": msg("In RAM (GPU only)"),
        "none": msg("none"),
    },
    "kinds": {"fetched": msg("downloaded"), "made here": msg("result"), "graph": msg("graph")},
    "texts": {
        "manual": msg("Python's manual (packaged)"),
        "wikitext2": msg("WikiText-2 (from the hub)"),
        "c4": msg("C4 (from the hub)"),
        "file": msg("My own file"),
    },
    "course_table": (
        "",
        msg("Bits per quantized weight"),
        msg("Original size"),
        msg("Quantized size"),
        msg("Relative loss"),
    ),
    "compare_table": (
        msg("Variant"),
        msg("Bits per parameter (per quantized weight)"),
        msg("Weights"),
        msg("Perplexity"),
        msg("KL"),
        msg("Top-1 match"),
        msg("Prefill/s"),
        msg("Decode/s"),
        msg("Peak"),
        msg("Against the prediction"),
    ),
    "how": (
        (
            msg("What quantization does"),
            msg(
                "A weight is a number of 16 or 32 bits. Quantization maps each group of neighboring weights (64, for example) to a grid of few values, 16 with 4 bits, and stores the grid's scale and zero point with one index per weight."
            ),
        ),
        (
            msg("Round to nearest"),
            msg(
                "Every weight takes the nearest value on the grid. This is fast, but nothing compensates for the rounding errors."
            ),
        ),
        (
            msg("HQQ"),
            msg(
                "Half-quadratic quantization optimizes each group's zero point so that most weights are close to the grid while a few outliers may be far off. It needs no calibration text."
            ),
        ),
        (
            msg("GPTQ"),
            msg(
                "Runs a calibration text to learn how the inputs of a layer correlate. It then rounds column by column and adjusts the remaining columns to compensate, so that the layer's outputs change as little as possible."
            ),
        ),
        (
            msg("AWQ"),
            msg(
                "Activation-aware scaling: a calibration text shows which inputs are large. Their weights are scaled up before rounding and the inputs scaled down, which protects the important weights at no cost at run time."
            ),
        ),
        (
            msg("Dynamic int8"),
            msg(
                "Each row of weights gets an 8-bit scale in advance, and each token's activations get one at run time. Products are computed in integers, which is fast on CPUs."
            ),
        ),
        (
            msg("bitsandbytes"),
            msg(
                "NF4 spaces its 16 values like a normal distribution, because weights follow one. LLM.int8 keeps the few activations above a threshold in half precision and the rest in 8 bits."
            ),
        ),
    ),
    "places": {"gpu": msg("GPU"), "ram": msg("RAM"), "disk": msg("disk"), "mapped": msg("disk, memory-mapped")},
    "methods": {
        "resident": msg("not offloaded"),
        "ram": msg("blocks in RAM"),
        "disk": msg("blocks on disk"),
        "streamed": msg("disk, no page cache"),
        "both": msg("half RAM, half disk"),
        "accelerate": msg("accelerate, disk"),
    },
    "offload_table": (
        msg("method"),
        msg("s per token"),
        msg("predicted"),
        msg("peak RAM"),
        msg("predicted"),
        msg("peak VRAM"),
        msg("read"),
    ),
    "recall_table": (msg("Distance in tokens"), msg("Result"), msg("Confidence"), msg("Control word")),
    "strategies_table": (
        msg("Strategy"),
        msg("Tokens"),
        msg("Perplexity"),
        msg("ms per token"),
        msg("Cache"),
        msg("RAM"),
    ),
    "long_how": (
        (
            msg("Window"),
            msg(
                "The model attends only to the latest tokens, so memory and time per token stay constant however long the text grows."
            ),
        ),
        (
            msg("Sinks"),
            msg(
                "Attention puts much weight on the first few tokens, whatever they are. Quality collapses once they leave the window, so a few of them stay cached (StreamingLLM). They carry no information about the text."
            ),
        ),
        (
            msg("What is evicted"),
            msg(
                "Everything between the sinks and the window. A window does not extend what a model can recall: generation stays fluent, but a fact that has left the window is lost. The recall test shows it."
            ),
        ),
        (
            msg("Cache type"),
            msg(
                "Keys and values in 8, 4 or 2 bits hold the same tokens in a fraction of the memory. The first and the latest tokens stay unquantized. 4 bits lose almost nothing; 2 bits have a visible effect."
            ),
        ),
        (
            msg("Stride"),
            msg(
                "Perplexity and hidden states of a given text need no cache: windows overlap, and every token is scored in the first window that contains it, with at least window minus stride tokens of context."
            ),
        ),
        (
            msg("Recomputation"),
            msg(
                "Models with learned positions (GPT-2) cannot slide the window: when it is full, three quarters of it are recomputed."
            ),
        ),
    ),
    "actions": {
        "load": msg("load"),
        "unload": msg("unload"),
        "generate": msg("generate"),
        "batch": msg("batch"),
        "quantize": msg("quantize"),
        "compare": msg("compare"),
        "export": msg("export"),
        "exercise": msg("exercise"),
        "offload": msg("offload"),
        "perplexity": msg("perplexity"),
        "recall": msg("recall"),
        "sweep": msg("sweep"),
        "hidden": msg("hidden states"),
        "verify": msg("verify"),
    },
    "claims": {
        "load": msg("Loading"),
        "answer": msg("Answer with a full context"),
        "fits": msg("Within the budget"),
        "prefill": msg("Prefill speed"),
        "decode": msg("Decode speed"),
        "kl": msg("Close to the original"),
        "parity": msg("Parity of the graph"),
        "recall": msg("Recall within the context"),
    },
    "claim_verdicts": {
        "passed": msg("holds"),
        "failed": msg("does not hold"),
        "measured": msg("measured"),
        "not measured": msg("not measured"),
    },
    "units": {"blocks": msg("blocks"), "runs": msg("runs"), "tokens": msg("tokens"), "windows": msg("windows")},
    "export": {"prefill": msg("Prefill"), "decode": msg("Decoding with the cache")},
    "slider": {"ram": msg("RAM limit, GB"), "vram": msg("GPU memory limit, GB")},
    "long": {
        "continue": msg("Continue"),
        "chat": msg("Chat"),
        "perplexity": msg("Perplexity"),
        "hidden": msg("Hidden states"),
        "recall": msg("Recall test"),
        "strategies": msg("Cache strategies"),
    },
}


def name(group: str, key: str) -> str:
    """A name out of a group ("shares", "memory", "verdicts"); an unknown key names itself."""
    names: dict[str, str] = NAMES[group]
    return names.get(key, key)
