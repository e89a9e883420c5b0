"""Options of an export, for the form, the command line and the planner. Imports neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.fields import option
from lowmem.messages import msg

PRECISIONS = ("fp32", "fp16", "int8", "int4")

LABELS = {
    "fp32": msg("fp32 (full precision)"),
    "fp16": msg("fp16 (for GPUs)"),
    "int8": msg("int8 (8-bit weights, almost lossless)"),
    "int4": msg("int4 (4-bit weights, smallest and fastest, some loss)"),
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    format: str = option(
        "onnx",
        msg("Format"),
        msg("ONNX runs everywhere ONNX Runtime does; TensorRT builds an engine for one NVIDIA GPU."),
        choices=("onnx", "tensorrt"),
    )
    precision: str = option("int8", msg("Precision"), msg("Data type of the weights."), choices=PRECISIONS)
    group_size: int = option(
        32,
        msg("Group size"),
        msg("int4: weights that share a scale. Smaller groups lose less quality but take more memory."),
        low=16,
        high=128,
        step=16,
    )
    fast_prefill: str = option(
        "auto",
        msg("Fast prefill"),
        msg(
            "A second graph in dynamic int8 processes prompts about twice as fast and takes one byte per weight. Automatic: only with int8."
        ),
        choices=("auto", "on", "off"),
    )
    fused: bool = option(
        True,
        msg("Fused graph"),
        msg("Use ONNX Runtime's fused operators where the model family has them; off: standard operators only."),
    )
    optimise: bool = option(
        False,
        msg("Optimize"),
        msg("Generic graphs: fuse attention, norms and activations with ONNX Runtime's optimizer."),
    )

    @property
    def has_prefill(self) -> bool:
        """Whether there is a second graph for prompts. int4 is for little memory, so there it is off by default."""
        if self.precision not in ("int8", "int4"):
            return False
        return self.precision == "int8" if self.fast_prefill == "auto" else self.fast_prefill == "on"
