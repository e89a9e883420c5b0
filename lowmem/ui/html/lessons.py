"""What each tab's technique does, what it costs and when to leave it, in words; and the course's typical figures.

The figures are those of the course that the exercises come from, its module "Otimização de Inferência".
"""

from __future__ import annotations

from dataclasses import dataclass

MODULE = "Otimização de Inferência"


@dataclass(frozen=True, slots=True)
class Typical:
    """A table of the course: the section it stands in, its header and its rows."""

    section: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One technique; `typical` is what the course says of other models."""

    title: str
    does: str
    costs: str
    avoid: str
    typical: tuple[Typical, ...] = ()


_SIZES = ("Model", "Bits", "Original size", "Quantized size", "Relative loss")
_SPEEDUPS = ("Model", "Precision", "Speedup over PyTorch", "Less memory")

LESSONS = {
    "generate": Lesson(
        "What an answer costs",
        "A model writes one token after the other, and reads all of its weights for each. The KV cache keeps what "
        "attention has computed of the tokens before, so that only the newest is computed.",
        "The weights lie in memory all the time; the cache grows with every token of prompt and answer, and is set "
        "aside before the first.",
        "Switch the cache off only where a few hundred megabytes decide: every token then computes the whole text again.",
    ),
    "quantize": Lesson(
        "Fewer bits for a weight",
        "Weights are kept as marks on a ruler, with a step and a zero for each group of neighbours. What is read for "
        "a token shrinks as much as what lies in memory.",
        "A little quality, which Compare measures; with GPTQ and AWQ also a text to read and some minutes, once.",
        "Leave it where the original fits and is fast enough, and stay at 4 bits or more with small models: they have "
        "less to spare.",
        (
            Typical(
                "Quantização Consciente de Ativações (AWQ)",
                _SIZES,
                (
                    ("LLaMA-7B", "4", "13 GB", "3.5 GB", "~0.5%"),
                    ("LLaMA-13B", "4", "25 GB", "6.5 GB", "~0.8%"),
                    ("LLaMA-70B", "4", "140 GB", "35 GB", "~1.2%"),
                ),
            ),
            Typical(
                "GPTQ: Quantização Otimizada para Transformers",
                _SIZES,
                (
                    ("LLaMA-7B", "4", "13 GB", "3.5 GB", "~0.3%"),
                    ("LLaMA-13B", "4", "25 GB", "6.5 GB", "~0.5%"),
                    ("LLaMA-70B", "4", "140 GB", "35 GB", "~0.8%"),
                    ("LLaMA-7B", "3", "13 GB", "2.6 GB", "~1.0%"),
                ),
            ),
        ),
    ),
    "offload": Lesson(
        "Blocks that come and go",
        "The blocks that fit stay where the model computes. The others lie in RAM or on disk and pass through a small "
        "ring of buffers, the next one arriving while one is at work.",
        "Time: what does not stay is read again for every pass. A pass can serve several answers at once, which "
        "then cost little more than one.",
        "Quantize first: four times fewer bytes to read is four times less waiting. Offload what still does not fit.",
    ),
    "longctx": Lesson(
        "Text without end",
        "A window keeps the latest tokens and a few of the first, the sinks, on which attention leans. Older tokens "
        "make room, so memory and time for a token stay the same.",
        "What has left the window is forgotten. Fewer bits for keys and values keep more tokens in the same memory, "
        "a little less exactly.",
        "Leave the window at 0 where the text fits the model's context, or where an early detail will be asked for.",
    ),
    "export": Lesson(
        "The model as a graph",
        "The model is written down as a graph of operators, which ONNX Runtime runs without PyTorch, with fused "
        "operators and weights in 8 or 4 bits.",
        "Disk for a second copy, some seconds to write it, and a parity check against the original.",
        "Stay with PyTorch to look at hidden states, to use a window, or with a family that has no fused graph.",
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
