"""Five ways to read on when a text is longer than one would like to remember, side by side; imports no torch.

Each way reads the same text in a process of its own. Along the text stand, for each: perplexity of the stretch
before, milliseconds for one more token, bytes of the cache and of the process.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.datasets.texts import MANUAL, Text, tail
from lowmem.errors import Cancelled, LowMemError
from lowmem.events import CancelToken, Receipt, Step
from lowmem.longctx.options import ExerciseOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.models.source import read_spec
from lowmem.units import format_bytes

log = logging.getLogger("lowmem.exercise")

DEFAULT_OPTIONS = ExerciseOptions()


@dataclass(frozen=True, slots=True)
class Point:
    """One way at one place of the text.

    Args:
        way: its name.
        tokens: read so far.
        perplexity: since the point before.
        token_seconds: for one more token, as in generation.
        kv_bytes: of keys and values.
        ram_bytes: resident set of the process.
        error: why there is no figure, or "".
    """

    way: str
    tokens: int = 0
    perplexity: float | None = None
    token_seconds: float | None = None
    kv_bytes: int | None = None
    ram_bytes: int | None = None
    error: str = ""

    def line(self) -> str:
        if self.error:
            return f"{self.way:<28} {self.error}"
        return (
            f"{self.way:<28} {self.tokens:>8,} tokens  perplexity {self.perplexity:>10,.2f}  "
            f"{1000 * (self.token_seconds or 0):>7.1f} ms/token  cache {format_bytes(self.kv_bytes or 0):>8}  "
            f"RAM {format_bytes(self.ram_bytes or 0):>8}"
        )


def ways(options: ExerciseOptions) -> dict[str, dict[str, Any]]:
    """Name -> fields of `GenerateOptions`."""
    window = options.window
    return {
        "full cache": {},
        "window without sinks": {"window": window, "sinks": 0},
        "window with sinks": {"window": window, "sinks": options.sinks},
        "window recomputed": {"window": window, "sinks": 0, "use_cache": False},
        f"full cache in {options.kv_bits} bits": {"cache_type": f"int{options.kv_bits}"},
    }


def exercise(
    ref: str,
    text: str | Path | Text = MANUAL,
    options: ExerciseOptions = DEFAULT_OPTIONS,
    *,
    precision: str = "auto",
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Point | Receipt]:
    """Read `text` in every way; points come as each way ends, a receipt with all of them last.

    Args:
        text: one that is here, or "manual", "wikitext2" or a file, see `measure.texts.tail`.

    Raises:
        BadInput, ModelNotFound, Offline: model or text cannot be had.
        Cancelled: within a second; the points so far have been yielded.
    """
    cancel, started = cancel or CancelToken(), time.perf_counter()
    spec, chosen = read_spec(ref), text if isinstance(text, Text) else tail(text, cancel)
    points: list[Point] = []
    device, chosen_precision = "", precision
    with tempfile.TemporaryDirectory(prefix="lowmem-exercise-") as work:
        copy = Path(work) / "text.txt"
        copy.write_text(chosen.text, encoding="utf-8")
        for number, (way, fields) in enumerate(ways(options).items()):
            arguments = {
                "ref": ref,
                "precision": precision,
                "text": str(copy),
                "fields": fields,
                "options": asdict(options),
                "budget": budget.as_dict(),
            }
            for event in _isolated(arguments, cancel, budget):
                if isinstance(event, Step):
                    done = 100 * number + event.done
                    yield Step(done, 100 * len(ways(options)), f"{way}: {event.note}", "%")
                elif isinstance(event, str):
                    points.append(Point(way, error=event))
                    yield points[-1]
                else:
                    device, chosen_precision = event.value["device"], event.value["precision"]
                    for point in event.value["points"]:
                        points.append(Point(way, **point))
                        yield points[-1]
    yield Receipt(
        action="exercise",
        model=spec.name,
        precision=chosen_precision,
        device=device,
        seconds=time.perf_counter() - started,
        prompt_tokens=max((point.tokens for point in points), default=0),
        notes=tuple(f"{point.way}: {point.error}" for point in points if point.error),
        snippet=_snippet(ref, options),
        details={"text": chosen.name, **asdict(options), "points": [asdict(point) for point in points]},
    )


def _isolated(arguments: dict[str, Any], cancel: CancelToken, budget: MemoryBudget) -> Iterator[Step | Finished | str]:
    """A way's events; a sentence in place of its result when it fails."""
    try:
        yield from run_isolated("read_long_text", arguments, cancel, budget)
    except Cancelled:
        raise
    except LowMemError as error:
        yield str(error)
    except RuntimeError as error:
        log.exception("a way of the exercise failed")
        yield f"An error that was not foreseen: {(str(error).strip().splitlines() or [''])[-1][:300]}"


def _snippet(ref: str, options: ExerciseOptions) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in asdict(options).items())
    return (
        "from lowmem.longctx.exercise import Point, exercise\n"
        "from lowmem.longctx.options import ExerciseOptions\n\n"
        f"for event in exercise({ref!r}, options=ExerciseOptions({given})):\n"
        "    if isinstance(event, Point):\n"
        "        print(event.line())\n"
    )


def by_way(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that have figures, in the order of the text."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.way, [])
        if not point.error:
            found[point.way].append(point)
    return found
