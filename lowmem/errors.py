"""The only errors a person sees.

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class LowMemError(Exception):
    """What failed, with its numbers, and the next click.

    Args:
        message: one sentence that says what failed and names the number.
        hint: one sentence that says what to do next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to be part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class BadInput(LowMemError):
    """An option, prompt or file that cannot be used as given."""


class ModelNotFound(LowMemError):
    """No model behind the reference: unknown id, empty folder, missing file."""


class GatedModel(LowMemError):
    """The hub wants a token, or the licence accepted, first."""


class UnsafeModel(LowMemError):
    """Weights only as pickles, or code of the repository's own would have to run."""


class CorruptModel(LowMemError):
    """Truncated or inconsistent weights, or numbers that are not numbers."""


class Offline(LowMemError):
    """The hub cannot be reached."""


class DiskFull(LowMemError):
    """Not enough disk for what is about to be written."""


class DoesNotFit(LowMemError):
    """The prediction exceeds the budget, known before any memory is taken."""


class OutOfMemory(LowMemError):
    """The memory ran out, or the budget was reached, while running."""


class Unsupported(LowMemError):
    """A model, device or option that this version cannot serve."""


class NotAllowed(LowMemError):
    """Left to the owner of a page, or more than a visitor may ask for."""


class MissingDependency(LowMemError):
    """An optional package is absent; the hint carries the pip line."""


class Cancelled(LowMemError):
    """Somebody pressed Stop."""

    def __init__(self, message: str = "Stopped.", hint: str = "") -> None:
        super().__init__(message, hint)
