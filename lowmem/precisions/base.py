"""The interface of a precision: label, devices, bytes per layer, and how its layers are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.models.quantization import Quantization
from lowmem.models.spec import DTYPE_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowmem.kernels.packed_rows import PackedRows


@dataclass(frozen=True)
class Precision:
    """How the weights of a model are held. This class keeps them dense; quantized precisions override what differs.

    Layers are made by `linear` and `embedding`, which import torch; everything else is arithmetic for the planner.

    Args:
        key: name in options, flags and plans.
        label: name on the page.
        dtype: a name from `Device.dtypes` (fp32, bf16, fp16), the dtype of activations and KV cache; "" for the one that
            the device computes best.
        backends: what can compute in it, "torch", "onnx" or both.
        covers_embeddings: embeddings and the output head are quantized too, not only the decoder blocks.
    """

    key: str
    label: str
    dtype: str = ""
    backends: tuple[str, ...] = ("torch",)
    covers_embeddings: bool = False

    def refusal(self, device: Device) -> str | None:
        """Why the precision does not run on `device`, None if it does."""
        return (
            None
            if not self.dtype or self.dtype in device.dtypes
            else msg("{device} does not support {key}.", device=device.name, key=self.key)
        )

    def rank(self, device: Device) -> int | None:
        """Position in the automatic choice for `device`, 0 first; None if it is only taken on request.

        On a GPU quality falls step by step: half precision, 8 bits, 4 bits. On a CPU dynamic int8 is both the fastest and
        nearly exact, so it comes before wider precisions.
        """
        return 0 if device.kind != "cpu" and device.dtypes[0] == self.dtype else None

    def dense(self, dtype: str, stored: Quantization | None) -> Precision:  # noqa: ARG002
        """The precision of layers that the checkpoint stores dense, for a computation in `dtype`."""
        return self

    def quantizes(self, inputs: int) -> bool:  # noqa: ARG002
        """Whether linear layers with this many inputs are quantized."""
        return False

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a quantized linear layer, without its bias."""
        raise NotImplementedError

    def embedding_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a quantized embedding, which a tied head shares."""
        raise NotImplementedError

    def pass_bytes(self, rows: int, columns: int) -> int:  # noqa: ARG002
        """What a layer [rows, columns] holds of every token while it computes, besides its input and output."""
        return 0

    def temporary_bytes(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes that quantizing a matrix takes besides the stored tensor and the result."""
        return rows * columns * DTYPE_BYTES[dtype]

    def linear(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A layer that computes `x W^T + b`, for `weight` [out, in] as it is stored."""
        raise NotImplementedError

    def embedding(self, shape: tuple[int, int], read: Callable[[int, int], Tensor]) -> PackedRows:
        """The table of an embedding of `shape`; `read` returns its rows from one (inclusive) to another (exclusive)."""
        raise NotImplementedError
