"""Dynamic int8 on CPUs, by FBGEMM: a scale per output channel for weights, one per token for activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.kernels import layouts
from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowmem.kernels.int8_linear import Int8Linear
    from lowmem.kernels.packed_rows import PackedRows

BITS = 8


@dataclass(frozen=True)
class Int8(Precision):
    """Embeddings and head are quantized as well: in a small model they are a third of the weights.

    Args:
        fine: linear layers keep 16 bits of their activations (`FineInt8Linear`).
    """

    fine: bool = False

    def refusal(self, device: Device) -> str | None:
        if device.kind != "cpu":
            return msg("Dynamic int8 is a CPU method; on a GPU use 8-bit or 4-bit bitsandbytes.")
        return None if layouts.has_int8_kernels() else msg("Dynamic int8 needs an x86 processor.")

    def rank(self, device: Device) -> int | None:
        return 0 if device.kind == "cpu" else None

    def quantizes(self, inputs: int) -> bool:  # noqa: ARG002
        return True

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        return layouts.int8_bytes(outputs, inputs)

    def embedding_bytes(self, rows: int, columns: int) -> int:
        return layouts.rows_bytes(rows, columns, BITS)

    def temporary_bytes(self, rows: int, columns: int, dtype: str) -> int:  # noqa: ARG002
        """The codes before they are packed, and two fp32 copies of the rows at work."""
        return rows * columns + 2 * 4 * min(rows, layouts.QUANTIZED_ROWS) * columns

    def pass_bytes(self, rows: int, columns: int) -> int:
        """The activations divided by their scale in fp32 and their codes; FBGEMM's sums in int32."""
        return 5 * columns + 4 * rows

    def linear(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:  # noqa: ARG002
        return self._layer().from_weight(weight, bias)

    def embedding(self, shape: tuple[int, int], read: Callable[[int, int], Tensor]) -> PackedRows:
        from lowmem.kernels.packed_rows import PackedRows

        return PackedRows.quantized(shape, read, BITS)

    def _layer(self) -> type[Int8Linear]:
        from lowmem.kernels.int8_fine import FineInt8Linear
        from lowmem.kernels.int8_linear import Int8Linear

        return FineInt8Linear if self.fine else Int8Linear


PRECISION = Int8("int8", msg("int8 (dynamic, for CPU)"), backends=("torch", "onnx"), covers_embeddings=True)
