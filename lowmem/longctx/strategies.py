"""Comparison of five KV cache strategies for texts longer than memory or context; imports no torch.

Each strategy streams the same text in a child process, which measures at several points perplexity since the point
before, time per token, and the memory of the cache and of the process.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.datasets.texts import MANUAL, Text, evaluation_text
from lowmem.errors import Cancelled, LowMemError
from lowmem.events import CancelToken, Receipt, Step
from lowmem.fields import arguments, literal
from lowmem.longctx.options import StrategyOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.units import format_bytes

log = logging.getLogger("lowmem.strategies")

DEFAULT_OPTIONS = StrategyOptions()


@dataclass(frozen=True, slots=True)
class Point:
    """Measurements of one strategy at one point of the text.

    Args:
        strategy: its name.
        tokens: read so far.
        perplexity: of the tokens since the point before.
        token_seconds: time of one decoding step.
        kv_bytes: size of the KV cache.
        ram_bytes: resident set size of the process.
        error: why there are no measurements, or "".
    """

    strategy: str
    tokens: int = 0
    perplexity: float | None = None
    token_seconds: float | None = None
    kv_bytes: int | None = None
    ram_bytes: int | None = None
    error: str = ""

    def line(self) -> str:
        if self.error:
            return f"{self.strategy:<28} {self.error}"
        return (
            f"{self.strategy:<28} {self.tokens:>8,} tokens  perplexity {self.perplexity:>10,.2f}  "
            f"{1000 * (self.token_seconds or 0):>7.1f} ms/token  cache {format_bytes(self.kv_bytes or 0):>8}  "
            f"RAM {format_bytes(self.ram_bytes or 0):>8}"
        )


def strategies(options: StrategyOptions) -> dict[str, dict[str, Any]]:
    """Name -> fields of `GenerateOptions` that describe the cache."""
    window = options.window
    return {
        msg("full cache"): {},
        msg("window without sinks"): {"window": window, "sinks": 0},
        msg("window with sinks"): {"window": window, "sinks": options.sinks},
        msg("window recomputed"): {"window": window, "sinks": 0, "use_cache": False},
        msg("full cache in {kv_bits} bits", kv_bits=options.kv_bits): {"cache_type": f"int{options.kv_bits}"},
    }


def compare_strategies(
    ref: str,
    text: str | Path | Text = MANUAL,
    options: StrategyOptions = DEFAULT_OPTIONS,
    *,
    precision: str = "auto",
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Point | Receipt]:
    """Stream `text` with every strategy; yields the points as each strategy ends, and a receipt with all of them.

    Args:
        text: a `Text`, or "manual", "wikitext2" or a file, see `evaluation_text`.
        budget: of each process.

    Raises:
        BadInput, ModelNotFound, Offline: the model or the text is not available.
        Cancelled: within a second; the points so far have been yielded.
    """
    cancel, started = cancel or CancelToken(), time.perf_counter()
    spec, chosen = read_spec(ref), text if isinstance(text, Text) else evaluation_text(text, cancel)
    points: list[Point] = []
    device, chosen_precision = "", precision
    with tempfile.TemporaryDirectory(prefix="lowmem-strategies-") as work:
        copy = Path(work) / "text.txt"
        copy.write_text(chosen.text, encoding="utf-8")
        for number, (strategy, fields) in enumerate(strategies(options).items()):
            job = {
                "ref": ref,
                "precision": precision,
                "text": str(copy),
                "fields": fields,
                "options": asdict(options),
                "budget": budget.as_dict(),
            }
            for event in _isolated(job, cancel, budget):
                if isinstance(event, Step):
                    done = 100 * number + event.done
                    yield Step(done, 100 * len(strategies(options)), f"{strategy}: {event.note}", "%")
                elif isinstance(event, str):
                    points.append(Point(strategy, error=event))
                    yield points[-1]
                else:
                    device, chosen_precision = event.value["device"], event.value["precision"]
                    for point in event.value["points"]:
                        points.append(Point(strategy, **point))
                        yield points[-1]
    yield Receipt(
        action="strategies",
        model=spec.name,
        precision=chosen_precision,
        device=device,
        seconds=time.perf_counter() - started,
        prompt_tokens=max((point.tokens for point in points), default=0),
        notes=tuple(f"{point.strategy}: {point.error}" for point in points if point.error),
        snippet=_snippet(ref, text, options, precision, budget),
        details={"text": chosen.name, **asdict(options), "points": [asdict(point) for point in points]},
    )


def _isolated(job: dict[str, Any], cancel: CancelToken, budget: MemoryBudget) -> Iterator[Step | Finished | str]:
    """The events of a strategy's process; if it fails, the error message instead of the result."""
    try:
        yield from run_isolated("measure_strategy", job, cancel, budget)
    except Cancelled:
        raise
    except LowMemError as error:
        yield str(error)
    except RuntimeError as error:
        log.exception("a cache strategy failed")
        yield msg("Unexpected error: {error}", error=(str(error).strip().splitlines() or [""])[-1][:300])


def _snippet(ref: str, text: str | Path | Text, options: StrategyOptions, precision: str, budget: MemoryBudget) -> str:
    chosen = f"Text({text.name!r}, {literal(text.text, 'text.json')})" if isinstance(text, Text) else repr(str(text))
    return (
        "import lowmem\n"
        "from lowmem.datasets.texts import Text\n"
        "from lowmem.longctx.options import StrategyOptions\n"
        "from lowmem.longctx.strategies import Point, compare_strategies\n\n"
        f"text = {chosen}\n"
        f"options = StrategyOptions({arguments(asdict(options))})\n"
        f"budget = lowmem.MemoryBudget({arguments(budget.as_dict())})\n"
        f"for event in compare_strategies({ref!r}, text, options, precision={precision!r}, budget=budget):\n"
        "    if isinstance(event, Point):\n"
        "        print(event.line())\n"
    )


def by_strategy(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Strategy -> its points without errors, in the order of the text."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.strategy, [])
        if not point.error:
            found[point.strategy].append(point)
    return found
