"""Recognize the out-of-memory errors of all libraries; imports no torch."""

from __future__ import annotations

from lowmem.errors import OutOfMemory

_SAYINGS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that RAM or GPU memory ran out, or that the budget was exceeded."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)
