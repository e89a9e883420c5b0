"""The errors shown to people. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from lowmem.messages import msg

log = logging.getLogger("lowmem.errors")


class LowMemError(Exception):
    """An error with a message for people and a hint at the next step.

    Args:
        message: one sentence: what failed, with its numbers.
        hint: one sentence: what to do next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class BadInput(LowMemError):
    """An option, prompt or file that cannot be used as given."""


class ModelNotFound(LowMemError):
    """No model behind the reference: unknown id, empty folder, missing file."""


class GatedModel(LowMemError):
    """The hub requires a token, or that its license is accepted."""


class UnsafeModel(LowMemError):
    """The repository has only pickled weights, or requires its own code."""


class CorruptModel(LowMemError):
    """Truncated or inconsistent weights, or NaN."""


class Offline(LowMemError):
    """The hub cannot be reached."""


class DiskFull(LowMemError):
    """Not enough disk space for the files to be written."""


class DiskFailed(LowMemError):
    """The system refuses to read or write a file: a failing disk, a read-only folder, a missing permission."""


class DoesNotFit(LowMemError):
    """The estimate exceeds the budget; raised before any memory is allocated."""


class OutOfMemory(LowMemError):
    """Memory ran out, or the budget was exceeded, during a run."""


class Unsupported(LowMemError):
    """A model, device or option that this version does not support."""


class NotAllowed(LowMemError):
    """Only the owner of the page may do this, or it exceeds a visitor's quota."""


class MissingDependency(LowMemError):
    """An optional package is missing; the hint has the pip command."""


class Cancelled(LowMemError):
    """The user pressed Stop."""

    def __init__(self, message: str = msg("Stopped."), hint: str = "") -> None:
        super().__init__(message, hint)


_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "defaultcpuallocator",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "failed to map segment",
    "could not create a primitive\n",
    "can't start new thread",
)
"""Of torch, CUDA's libraries, C++, ONNX Runtime, the dynamic linker, whose `mmap` failed, and oneDNN, which maps memory for the
code that it compiles; of "could not create a primitive descriptor ..." other reasons are likelier."""

_LIBRARIES = ("onnxruntime", "safetensors", "safetensors_rust", "tokenizers")
"""Their errors derive from Exception alone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, of any library, means that RAM or GPU memory ran out, or that the budget was exceeded."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    known = (
        isinstance(error, (RuntimeError, OSError, ImportError)) or type(error).__module__.split(".")[0] in _LIBRARIES
    )
    return known and any(saying in f"{error}\n".lower() for saying in _SAYINGS)


LESS_MEMORY = msg("Close other programs, or choose a smaller model, fewer bits or a shorter text.")

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quotas
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_TOO_MANY = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
"""Processes or open files."""


FREE_SPACE = msg("Free some space and start again.")


def file_error(error: OSError, what: str, if_full: str = FREE_SPACE) -> LowMemError:
    """The error for people that says why the system refused a file.

    Args:
        what: the consequence, "out was not finished".
        if_full: the hint where the disk is full.
    """
    log.info("%s", what, exc_info=error)
    reason = error.strerror or first_line(error)
    if error.errno in _FULL:
        return DiskFull(msg("The disk is full: {what}.", what=what), if_full)
    path = error.filename2 or error.filename  # of a copy, the one that is written
    if path is None:
        message = msg("{what}: {reason}.", what=what, reason=reason)
    else:
        message = msg("{what}: {path}: {reason}.", what=what, path=os.fsdecode(path), reason=reason)
    if error.errno in _FORBIDDEN:
        return DiskFailed(message, msg("Choose another folder, or set LOWMEM_HOME to one that can be written to."))
    if error.errno in _TOO_MANY:
        return LowMemError(message, msg("Close other programs, then start again."))
    return DiskFailed(message, msg("Check the disk, then start again."))


@contextmanager
def file_errors(what: str, if_full: str = FREE_SPACE) -> Iterator[None]:
    """Within the context, a file that the system refuses is a `file_error`."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise file_error(error, what, if_full) from error


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Within the context, memory that runs out, in whichever library, is `OutOfMemory`. Child processes know more to say."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LowMemError) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(msg("Memory ran out: {what}.", what=what), LESS_MEMORY) from error
