"""Output of commands: results on standard output, progress and the receipt on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from lowmem.events import Receipt, Step
from lowmem.units import format_bytes, format_seconds, format_time_range


class Progress:
    """One line on standard error, rewritten in place; nothing unless that is a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._visible = False

    def show(self, step: Step) -> None:
        if self._terminal:
            share = f"{step.done / step.total:4.0%} " if step.total else ""
            print(f"\r\x1b[K{share}{step.note}", end="", file=sys.stderr, flush=True)
            self._visible = True

    def clear(self) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._visible = False


def follow(events: Iterable[Any], show: Callable[[Any], None] | None = None) -> Receipt:
    """Run an action to its end and show its progress; returns its receipt, the last event.

    Args:
        show: called with every event but steps and the receipt.
    """
    progress = Progress()
    receipt: Receipt | None = None
    for event in events:
        if isinstance(event, Step):
            progress.show(event)
            continue
        progress.clear()
        if isinstance(event, Receipt):
            receipt = event
        elif show is not None:
            show(event)
    progress.clear()
    if receipt is None:
        raise RuntimeError("an action ended without a receipt")
    return receipt


def finish(receipt: Receipt, as_json: bool, *summary: str) -> int:
    """Print the receipt and return the exit status.

    Args:
        as_json: one JSON object on standard output, and nothing else.
        summary: lines printed before predicted and measured memory and time.
    """
    if as_json:
        print(json.dumps(receipt.as_dict()))
        return 0
    for line in (*summary, *_figures(receipt), *receipt.notes):
        print(line, file=sys.stderr)
    return 0


def _figures(receipt: Receipt) -> list[str]:
    def size(figures: dict[str, int], memory: str) -> str:
        return format_bytes(figures[memory]) if memory in figures else "?"

    lines = [
        f"{memory.upper()} peak: predicted {size(receipt.predicted, memory)}, measured {size(receipt.measured, memory)}"
        for memory in receipt.predicted | receipt.measured
    ]
    if receipt.predicted_seconds:
        took = format_seconds(receipt.seconds)
        lines.append(f"Time: predicted {format_time_range(receipt.predicted_seconds)}, took {took}")
    return lines
