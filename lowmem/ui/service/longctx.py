"""Actions of the page on a long text with the resident model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.datasets.long_text import long_text
from lowmem.datasets.texts import MANUAL, Text, evaluation_text
from lowmem.events import CancelToken, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import check_stride
from lowmem.longctx import actions
from lowmem.longctx.options import StrategyOptions
from lowmem.longctx.strategies import Point, compare_strategies
from lowmem.machine.budget import MemoryBudget
from lowmem.ui.service.engine import AUTO, Engine
from lowmem.ui.service.results import new_folder


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where a long text comes from: an uploaded file, else an address or a name, else the text itself."""

    text: str = ""
    file: str | None = None
    address: str | None = ""

    @property
    def empty(self) -> bool:
        return not (self.text.strip() or self.file or self.address)

    def read(self, cancel: CancelToken) -> Text:
        """The text; raises what `datasets.long_text` raises."""
        return long_text(self.text, self.file, self.address or "", cancel)


class LongContextService:
    """Long texts for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def perplexity(
        self, source: TextSource, options: GenerateOptions, stride: int, cancel: CancelToken
    ) -> Iterator[Any]:
        """Perplexity along a text: in windows that move on by `stride`, or read once through the cache if that is 0."""
        self.engine.require_model()
        limit = self.engine.access.reading_limit
        if stride:
            check_stride(options.window, stride)

        def events() -> Iterator[Any]:
            text, run = source.read(cancel).text, self.engine.session.run
            if stride:
                window = options.window
                yield from run(actions.sliding_perplexity, text, window, stride, cancel=cancel, limit=limit)
            else:
                yield from run(actions.streaming_perplexity, text, options, cancel=cancel, limit=limit)

        return self.engine.noted(events())

    def hidden_states(
        self, source: TextSource, window: int, stride: int, layers: Sequence[int], format: str, cancel: CancelToken
    ) -> Iterator[Step | Receipt]:
        """Write the hidden states of `layers`, window by window, to the file in the receipt's `details["file"]`."""
        self.engine.require_model()
        check_stride(window, stride)
        limit = self.engine.access.reading_limit
        kind = "safetensors" if format == "safetensors" else "npy"

        def events() -> Iterator[Any]:
            text = source.read(cancel).text
            path = new_folder("hidden") / f"hidden_states.{kind}"
            yield from self.engine.session.run(
                actions.hidden_states, text, window, stride, path, layers=layers, cancel=cancel, limit=limit
            )

        return self.engine.noted(events())

    def recall(self, options: GenerateOptions, cancel: CancelToken) -> Iterator[Step | Receipt]:
        """Does the model recall a word from its context, half a window and two windows later?"""
        self.engine.require_model()
        text, limit = evaluation_text(MANUAL).text, self.engine.access.reading_limit
        return self.engine.noted(self.engine.session.run(actions.recall, text, options, cancel=cancel, limit=limit))

    def compare_strategies(
        self,
        model: str,
        source: TextSource,
        options: StrategyOptions,
        budget: MemoryBudget,
        cancel: CancelToken,
        precision: str = AUTO,
    ) -> Iterator[Step | Point | Receipt]:
        """Read a text with every cache strategy, each in its own child process; without a text, Python's manual."""
        self.engine.access.check_reading(options.tokens)
        self.engine.spec(model)  # refuses models that this visitor may not name
        budget = self.engine.child_budget(budget)

        def events() -> Iterator[Any]:
            text = MANUAL if source.empty else source.read(cancel)
            yield from compare_strategies(model, text, options, precision=precision, budget=budget, cancel=cancel)

        return self.engine.noted(events())
