"""GPTQ's storage format, as AutoGPTQ and GPTQModel define it, for every method that quantizes to a uniform grid.

A layer is stored as `qweight` and `qzeros` (codes packed into int32), `scales` (fp16) and `g_idx` (int32 [in], the
group of each input). Symmetric layers are stored as v1 ("gptq"), whose zero points are less one; others as
"gptq_v2", since v1 cannot hold a zero point of 0. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowmem.quant.base import Method
from lowmem.quant.card import vllm

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized

VLLM_BITS = (4, 8)


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of the codes, zero points and scales of a layer with `rows` outputs and `columns` inputs."""
    groups = 1 if group_size == -1 else columns // group_size
    words = math.ceil(columns * bits / 32) * rows + math.ceil(rows * bits / 32) * groups
    return 4 * words + 2 * groups * rows


class GptqFormat(Method):
    """A method whose layers are stored in GPTQ's format."""

    def layer_tensors(self, weight: Quantized, options: Any) -> dict[str, Tensor]:
        from lowmem.kernels.packing import to_gptq

        return to_gptq(weight, v2=not options.symmetric)

    def layer_bytes(self, rows: int, columns: int, options: Any) -> int:
        return packed_bytes(rows, columns, options.bits, options.group_size) + 4 * columns  # g_idx

    def packing_bytes(self, options: Any) -> int:  # noqa: ARG002
        return 1  # the codes; packing, which takes less than the original, begins once that is freed

    def config(self, options: Any) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": options.bits,
            "group_size": options.group_size,
            "desc_act": False,
            "sym": options.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if options.symmetric else "gptq_v2",
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": 0.0,
            "meta": self.meta(options),
        }

    def skipping(self, layers: Sequence[str]) -> dict[str, Any]:
        return {"dynamic": {rf"-:.*\.{re.escape(layer)}$": {} for layer in layers}}

    def serving(self, options: Any) -> str:
        if options.bits not in VLLM_BITS:
            return vllm(options.group_size, f"GPTQ layers of {options.bits} bits", "to 4 or 8 bits, symmetric")
        if not options.symmetric:
            return vllm(options.group_size, "GPTQ layers with zero points", "with symmetric on, or with AWQ")
        return vllm(options.group_size)
