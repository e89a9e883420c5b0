"""The token ids of the rows being generated, and the forward pass over a chunk of them.

Handles padding, windows, caches and the arguments a model's `forward` accepts; choosing tokens is `sampling`'s part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.generate.cache import factory, policy
from lowmem.generate.cache.capability import cache_use, position_inputs
from lowmem.generate.cache.packed import set_pads
from lowmem.generate.cache.window import WindowCache
from lowmem.generate.growing_rotation import GrowingRotation
from lowmem.generate.options import GenerateOptions
from lowmem.models.cache_argument import cache_argument


class Rows:
    """Token ids of the active rows, left-padded to one length, with their cache.

    With a window, tokens that the window has passed are evicted from `text` too.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
        longest = max(map(len, prompts))
        capacity = longest + options.max_new_tokens
        self.model = model
        self.length = longest
        self._window = options.window
        if options.window:
            capacity = min(capacity, max(longest, options.window) + options.window)
        # The first column of `text` that each row attends to; in front of it is padding, or evicted text.
        self._first = [longest - len(prompt) for prompt in prompts]
        # Padding repeats the row's first token: attention masks it, and the repetition penalty counts that token anyway.
        padded = [[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, self._first, strict=True)]
        self.text = torch.empty(len(prompts), capacity, dtype=torch.long, device=model.device)
        self.text[:, :longest] = torch.tensor(padded)
        self._begin = 0  # first column that is in the cache, or that is recomputed
        self._cache = None
        self._use = cache_use(model)
        self._growing, self._chunk = GrowingRotation(model), options.prefill_chunk
        self._switched = False  # a row has just become so long that its cached tokens are rotated by other frequencies
        if options.use_cache and self._use.cached:
            rows = len(prompts) * options.num_return_sequences
            self._cache = policy.make_cache(model, options, rows=rows, capacity=capacity, pads=self._first)
        slides = isinstance(self._cache, WindowCache) or policy.never_grows(self._cache)
        self._recomputes = bool(options.window) and not slides
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._cache_argument = cache_argument(model)

    def parts(self, chunk: int) -> Iterator[tuple[int, int]]:
        """The (start, end) columns of the passes that process the prompt."""
        if self._cache is None:
            yield 0, self.length
        elif isinstance(self._cache, WindowCache):
            start = 0
            for tokens in self._cache.parts(self.length, chunk if self._use.chunks else self.length):
                # A model that cannot continue a prompt in parts continues it token by token.
                for end in (start + tokens,) if self._use.chunks or not start else range(start + 1, start + tokens + 1):
                    yield start, end
                    start = end
        else:
            if self._recomputes:
                self._look_back(self._window)
            if not self._use.chunks:
                chunk = self.length
            elif not all(type(layer) is factory.FullLayer for layer in getattr(self._cache, "layers", ())):
                chunk = max(chunk, max(self._first) + 1)  # recurrent layers ignore padding only in their first pass
            for start in range(self._begin, self.length, chunk):
                yield start, min(start + chunk, self.length)

    def logits(self, start: int, end: int) -> Tensor:
        """Logits [rows, vocab] in float32 after column `end - 1`; columns before `start` are in the cache."""
        if self._recomputes or self._cache is None:
            start = self._recomputed_from(start, end)
        if self._switched and not self._recomputes and self._cache is not None:
            self._switched = False
            self._cache.reset()
            for begin in range(self._begin, start, self._chunk):
                self._pass(begin, min(begin + self._chunk, start))
        return self._pass(start, end)

    def _pass(self, start: int, end: int) -> Tensor:
        if isinstance(self._cache, WindowCache):  # whose positions stay below all limits
            return self._logits(start, end)
        with self._growing.of([self.length - first for first in self._first]):
            return self._logits(start, end)

    def _logits(self, start: int, end: int) -> Tensor:
        inputs: dict[str, object] = {"input_ids": self.text[:, start:end], "use_cache": False}
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        if self._cache is not None:
            inputs |= {self._cache_argument: self._cache, "use_cache": True}
        if isinstance(self._cache, WindowCache):
            inputs.update(self._cache.inputs(end - start, self.model.device, self.model.dtype))
        elif any(first > self._begin for first in self._first):
            # Without padding, pass neither mask nor positions: the model then takes its fast causal path.
            inputs.update(self._padding(start, end))
        elif self._use.states:
            inputs.update(position_inputs(self.model, start - self._begin, end - self._begin))
        return self.model(**inputs).logits[:, -1].float()

    @property
    def can_crop(self) -> bool:
        """Whether the latest tokens can be dropped from the cache."""
        layers = getattr(self._cache, "layers", None)
        if self._growing and self.text.shape[1] > self._growing.limit:
            return False
        return hasattr(self._cache, "crop") and (
            layers is None or all(type(layer) is factory.FullLayer for layer in layers)
        )

    def draft_logits(self, draft: list[int]) -> Tensor:
        """Logits [1 + draft, vocab] in float32 after the last token of the only row and after every draft token."""
        start, end = self.length - 1, self.length + len(draft)
        self.text[0, self.length : end] = torch.tensor(draft, dtype=torch.long)
        inputs: dict[str, object] = {"input_ids": self.text[:, start:end], self._cache_argument: self._cache}
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = end - start
        return self.model(**inputs, use_cache=True).logits[0, start - end :].float()

    def accept(self, tokens: list[int]) -> None:
        """Append verified tokens, and drop rejected draft tokens from the cache."""
        self.text[0, self.length : self.length + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        self.length += len(tokens)
        assert self._cache is not None, "prompt lookup needs a cache"
        self._cache.crop(self.length - 1)

    def _recomputed_from(self, start: int, end: int) -> int:
        """Where the pass begins if the window is recomputed: at every token without a cache, else when a row fills it."""
        if self._cache is None:
            if self._recomputes:
                self._look_back(self._window)
            return self._begin
        if all(end - first <= self._window for first in self._first):
            return start
        self._cache.reset()
        self._look_back(policy.recomputed_tokens(self._window))
        return self._begin

    def _look_back(self, tokens: int) -> None:
        """Limit rows that exceed the window to their last `tokens` tokens."""
        full = self.length - self._window
        self._first = [first if first >= full else self.length - tokens for first in self._first]
        self._begin = min(self._first)
        set_pads(self._cache, [first - self._begin for first in self._first])

    def _padding(self, start: int, end: int) -> dict[str, object]:
        places, first = torch.arange(self._begin, end), torch.tensor(self._first)[:, None]
        inputs: dict[str, object] = {"attention_mask": (places >= first).long().to(self.model.device)}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = (places[start - self._begin :] - first).clamp_(min=0).to(self.model.device)
        return inputs

    def append(self, tokens: Tensor) -> None:
        """Append one token to every row, int64 [rows]."""
        if self.length == self.text.shape[1]:
            self._evict(self.length - self._window)
        self.text[:, self.length] = tokens
        if self._growing.switch and not isinstance(self._cache, WindowCache):
            self._switched |= any(self.length - first == self._growing.switch for first in self._first)
        self.length += 1

    def _evict(self, tokens: int) -> None:
        self.text[:, : self._window] = self.text[:, tokens:].clone()
        self._first = [max(0, first - tokens) for first in self._first]
        self._begin = max(0, self._begin - tokens)
        self.length -= tokens

    def branch(self, copies: int) -> None:
        """Repeat every row `copies` times."""
        self._index([row for row in range(len(self._first)) for _ in range(copies)])
        if self._cache is not None:
            self._cache.batch_repeat_interleave(copies)

    def select(self, keep: list[int]) -> None:
        """Drop all rows but `keep`, so that later passes do not compute them."""
        self._index(keep)
        if self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(keep))

    def _index(self, rows: list[int]) -> None:
        self.text = self.text[rows]
        self._first = [self._first[row] for row in rows]
