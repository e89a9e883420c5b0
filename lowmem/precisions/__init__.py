"""The precisions a model can be loaded in, one module each. To add one, write its module and name it here."""

from __future__ import annotations

from lowmem.precisions import bf16, bnb8, fp16, fp32, int4, int8, nf4, stored
from lowmem.precisions.base import Precision

PRECISIONS: dict[str, Precision] = {
    module.PRECISION.key: module.PRECISION for module in (fp32, fp16, bf16, int8, int4, bnb8, nf4, stored)
}
"""By key, in the order in which the page offers them."""
