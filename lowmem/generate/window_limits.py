"""Limits of windows over a text; imports no torch."""

from __future__ import annotations

from lowmem.errors import BadInput
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg

UNBOUNDED = 2**40
"""The context, in tokens, of a windowed generation, which has no limit."""


def pass_tokens(device: str) -> int:
    """Tokens per pass when short windows are batched: a GPU needs many to be busy, while a CPU slows down with more.

    Args:
        device: the device type, "cpu" or "cuda".
    """
    return 512 if device == "cpu" else 2048


def check_window(options: GenerateOptions, limit: int) -> None:
    """Check the options `window` and `sinks` of a windowed KV cache.

    Args:
        limit: number of positions the model supports.

    Raises:
        BadInput: the sinks fill the window, or the window exceeds `limit`.
    """
    if not options.window:
        return
    if options.sinks >= options.window:
        raise BadInput(
            msg(
                "{sinks:,} sinks leave no room in a window of {window:,} tokens.",
                sinks=options.sinks,
                window=options.window,
            ),
            msg("Use fewer sinks (4 are enough) or a window larger than {sinks:,}.", sinks=options.sinks),
        )
    if options.window + options.sinks >= limit:
        message = msg(
            "A window of {window:,} tokens exceeds the model's {limit:,} positions.", window=options.window, limit=limit
        )
        if options.sinks:
            message = msg(
                "A window of {window:,} tokens with {sinks:,} sinks exceeds the model's {limit:,} positions.",
                window=options.window,
                sinks=options.sinks,
                limit=limit,
            )
        raise BadInput(
            message, msg("Use a window of {difference:,} or less.", difference=max(1, limit - options.sinks - 1))
        )


def context_of(model_context: int, options: GenerateOptions) -> int:
    """The most tokens of prompt and answer together; practically unlimited with a window."""
    return UNBOUNDED if options.window else model_context


def check_stride(window: int, stride: int) -> None:
    """Check overlapping windows over a text.

    Raises:
        BadInput: an empty window, or a stride that skips tokens.
    """
    if window < 1:
        raise BadInput(msg("The window over the text has 0 tokens."), msg("Use a window of at least 1 token."))
    if not 1 <= stride <= window:
        raise BadInput(
            msg(
                "A stride of {stride:,} does not work with windows of {window:,} tokens.", stride=stride, window=window
            ),
            msg("Use a stride from 1 to {window:,}; half the window is usual.", window=window),
        )


def check_token_window(window: int, limit: int) -> None:
    """Check that a window fits into one forward pass.

    Raises:
        BadInput: the window exceeds the model's positions.
    """
    if window > limit:
        raise BadInput(
            msg("A window of {window:,} tokens exceeds the model's {limit:,} positions.", window=window, limit=limit),
            msg("Use a window of {limit:,} or less.", limit=limit),
        )
