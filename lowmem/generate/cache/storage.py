"""Memory for the tensors of a KV cache, which stay for a whole text while activations come and go."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

MAPPED_BYTES = 64 * 1024
"""Smaller tensors come from the heap: a mapping takes whole pages."""


def new_store(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of `shape` on the device of `like`, in its dtype unless `dtype` is given; on Linux mapped outside the heap.

    A store is made in the middle of a forward pass. From the heap it would come to lie between activations that are freed
    soon, and the holes would stay with the process: 20 MB beside a cache of 24 MB.
    """
    dtype = dtype or like.dtype
    count = math.prod(shape)
    if like.device.type != "cpu" or sys.platform != "linux" or count * dtype.itemsize < MAPPED_BYTES:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
