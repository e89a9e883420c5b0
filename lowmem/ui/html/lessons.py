"""Each tab's technique in words: effect, cost and when not to use it; and the course's typical figures.

The figures are those of the course that the exercises come from, its module "Otimização de Inferência".
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.messages import msg

MODULE = "Otimização de Inferência"


@dataclass(frozen=True, slots=True)
class Typical:
    """A table of the course: its section, header and rows."""

    section: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One technique; `typical` are the course's figures for other models."""

    title: str
    does: str
    costs: str
    avoid: str
    typical: tuple[Typical, ...] = ()


_SIZES = (msg("Model"), msg("Bits"), msg("Original size"), msg("Quantized size"), msg("Relative loss"))
_SPEEDUPS = (msg("Model"), msg("Precision"), msg("Speedup over PyTorch"), msg("Less memory"))

LESSONS = {
    "generate": Lesson(
        msg("What generating an answer costs"),
        msg(
            "A model generates one token after another and reads all of its weights for each. The KV cache stores the keys and values of earlier tokens, so that only the newest token is computed."
        ),
        msg(
            "The weights stay in memory all the time. The cache grows with every token of prompt and answer, and is reserved in advance."
        ),
        msg(
            "Turn the cache off only if a few hundred megabytes make the difference: every token then recomputes the whole text."
        ),
    ),
    "quantize": Lesson(
        msg("Fewer bits per weight"),
        msg(
            "Weights are stored as indices into a grid, with a scale and a zero point for each group. The model takes less memory, and each token reads fewer bytes."
        ),
        msg(
            "Some quality, which Compare measures. GPTQ and AWQ also need a calibration text and take a few minutes, once."
        ),
        msg(
            "Skip it if the original fits and is fast enough. With small models stay at 4 bits or more, because they lose more quality."
        ),
        (
            Typical(
                "Quantização Consciente de Ativações (AWQ)",
                _SIZES,
                (
                    ("LLaMA-7B", "4", "13 GB", msg("3.5 GB"), msg("~0.5%")),
                    ("LLaMA-13B", "4", "25 GB", msg("6.5 GB"), msg("~0.8%")),
                    ("LLaMA-70B", "4", "140 GB", "35 GB", msg("~1.2%")),
                ),
            ),
            Typical(
                "GPTQ: Quantização Otimizada para Transformers",
                _SIZES,
                (
                    ("LLaMA-7B", "4", "13 GB", msg("3.5 GB"), msg("~0.3%")),
                    ("LLaMA-13B", "4", "25 GB", msg("6.5 GB"), msg("~0.5%")),
                    ("LLaMA-70B", "4", "140 GB", "35 GB", msg("~0.8%")),
                    ("LLaMA-7B", "3", "13 GB", msg("2.6 GB"), msg("~1.0%")),
                ),
            ),
        ),
    ),
    "offload": Lesson(
        msg("Streaming blocks into memory"),
        msg(
            "Blocks that fit stay resident on the computing device. The others are offloaded to RAM or disk and stream through a small ring of buffers: the next block is loaded while the current one computes."
        ),
        msg(
            "Time: offloaded blocks are read again for every token. Several sequences in parallel share each read, so they cost little more than one."
        ),
        msg(
            "Quantize first: a quarter of the bytes takes a quarter of the time to read. Offload only what still does not fit."
        ),
    ),
    "longctx": Lesson(
        msg("Unbounded generation"),
        msg(
            "A window caches the latest tokens and a few of the first, the attention sinks. Older tokens are evicted, so memory and time per token stay constant."
        ),
        msg(
            "The model cannot recall what has left the window. A quantized cache holds more tokens in the same memory, at a small loss of precision."
        ),
        msg("Leave the window at 0 if the text fits the model's context, or if early details matter."),
    ),
    "export": Lesson(
        msg("The model as a graph"),
        msg(
            "Writes the model as a graph of operators that ONNX Runtime runs without PyTorch, with fused operators and weights in 8 or 4 bits."
        ),
        msg("Disk space for a second copy, and some seconds to write it and verify it against the original."),
        msg("Stay with PyTorch for hidden states, a window, or a model family without a fused graph."),
        (
            Typical(
                "Inferência com TensorRT",
                _SPEEDUPS,
                (
                    ("GPT-2 Small", "FP16", "2-3x", "~30%"),
                    ("GPT-2 Small", "INT8", "3-4x", "~60%"),
                    ("BERT Base", "FP16", "2-4x", "~30%"),
                    ("BERT Base", "INT8", "4-6x", "~60%"),
                ),
            ),
        ),
    ),
}
