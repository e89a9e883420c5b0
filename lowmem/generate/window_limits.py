"""What a window may be; no torch."""

from __future__ import annotations

from lowmem.errors import BadInput
from lowmem.generate.options import GenerateOptions

UNBOUNDED = 2**40
"""The context, in tokens, of a generation that forgets what leaves its window."""


def pass_tokens(device: str) -> int:
    """Tokens up to which short windows over a text share a pass: a GPU is idle with few, a CPU is slower with more.

    Args:
        device: its kind, "cpu" or "cuda".
    """
    return 512 if device == "cpu" else 2048


def check_window(options: GenerateOptions, limit: int) -> None:
    """
    Args:
        limit: positions that the model knows.

    Raises:
        BadInput: sinks that fill the window, or a window beyond the model's limit.
    """
    if not options.window:
        return
    if options.sinks >= options.window:
        raise BadInput(
            f"{options.sinks:,} sinks leave nothing of a window of {options.window:,} tokens.",
            f"Use fewer sinks, 4 are enough, or a window above {options.sinks:,}.",
        )
    if options.window + options.sinks >= limit:
        with_sinks = f" with {options.sinks:,} sinks" if options.sinks else ""
        raise BadInput(
            f"A window of {options.window:,} tokens{with_sinks} is more than the model can see: it knows {limit:,} positions.",
            f"Use a window of {max(1, limit - options.sinks - 1):,} or less.",
        )


def context_of(model_context: int, options: GenerateOptions) -> int:
    """The most tokens of prompt and answer together: without end where a window forgets."""
    return UNBOUNDED if options.window else model_context


def check_stride(window: int, stride: int) -> None:
    """
    Raises:
        BadInput: windows that leave tokens out, or none.
    """
    if window < 1:
        raise BadInput("Windows over a text need a length, and the window is 0.", "Use a window of 1 token or more.")
    if not 1 <= stride <= window:
        raise BadInput(
            f"A stride of {stride:,} does not go with a window of {window:,} tokens: every token must be in a window.",
            f"Use a stride from 1 to {window:,}; half the window is usual.",
        )


def check_token_window(window: int, limit: int) -> None:
    """
    Raises:
        BadInput: a window that the model cannot read at once.
    """
    if window > limit:
        raise BadInput(
            f"A window of {window:,} tokens is more than the model can see: it knows {limit:,} positions.",
            f"Use a window of {limit:,} or less.",
        )
