"""A quantized checkpoint in its own codes. What it stores dense runs in int8 on CPUs, else in the compute dtype."""

from __future__ import annotations

from dataclasses import replace

from lowmem.kernels.layouts import has_int8_kernels
from lowmem.messages import msg
from lowmem.models.quantization import BNB, INT8, Quantization
from lowmem.precisions import int8
from lowmem.precisions.base import Precision


class Stored(Precision):
    def dense(self, dtype: str, stored: Quantization | None) -> Precision:
        """int8 on CPUs: a tied head is a fifth of a small model, and in fp32 takes longer per token than all packed layers.

        bitsandbytes' layers take far longer than that on CPUs, so the rest of such a checkpoint stays as it is.
        """
        if dtype != "fp32" or not has_int8_kernels() or (stored is not None and stored.method == BNB):
            return self
        # Next to exact packed layers the head would lose the most; int8 layers lose as much themselves.
        return replace(int8.PRECISION, fine=stored is not None and stored.method != INT8)


PRECISION = Stored("stored", msg("as stored (already quantized)"))
