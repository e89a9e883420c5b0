"""The text of the live rows, and the forward pass over a stretch of it.

Knows padding, windows, caches and what a model's forward accepts; nothing of how a token is chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.generate.cache import factory, policy
from lowmem.generate.cache.packed import set_pads
from lowmem.generate.cache.window import WindowCache
from lowmem.generate.options import GenerateOptions


class Rows:
    """The text of the live rows, left-padded to one length, and the forward pass over a stretch of it.

    With a window only the end of the text is kept, and what the window has left behind is not looked at again.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
        longest = max(map(len, prompts))
        capacity = longest + options.max_new_tokens
        self.model = model
        self.length = longest
        self._window = options.window
        if options.window:
            capacity = min(capacity, max(longest, options.window) + options.window)
        # Of each row, the first token in `text` that it may look at; what is in front is padding, or forgotten.
        self._first = [longest - len(prompt) for prompt in prompts]
        # A pad repeats the row's own first token: attention does not see it, and the repetition
        # penalty counts that token already.
        padded = [[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, self._first, strict=True)]
        self.text = torch.empty(len(prompts), capacity, dtype=torch.long, device=model.device)
        self.text[:, :longest] = torch.tensor(padded)
        self._begin = 0  # of what the cache holds, or of what is computed anew
        self._cache = None
        if options.use_cache:
            if not hasattr(model, "make_cache"):
                factory.check_supported(model)
            rows = len(prompts) * options.num_return_sequences
            self._cache = policy.make_cache(model, options, rows=rows, capacity=capacity, pads=self._first)
        self._recomputes = bool(options.window) and not isinstance(self._cache, WindowCache)
        self._accepted = set(inspect.signature(model.forward).parameters)

    def parts(self, chunk: int) -> Iterator[tuple[int, int]]:
        """The stretches in which to read the prompt."""
        if self._cache is None:
            yield 0, self.length
        elif isinstance(self._cache, WindowCache):
            start = 0
            for tokens in self._cache.parts(self.length, chunk):
                yield start, start + tokens
                start += tokens
        else:
            if self._recomputes:
                self._look_back(self._window)
            for start in range(self._begin, self.length, chunk):
                yield start, min(start + chunk, self.length)

    def logits(self, start: int, end: int) -> Tensor:
        """Logits [rows, vocab] in float32 after token `end - 1`, where tokens before `start` are in the cache."""
        if self._recomputes or self._cache is None:
            start = self._recomputed_from(start, end)
        inputs: dict[str, object] = {"input_ids": self.text[:, start:end], "use_cache": False}
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        if self._cache is not None:
            inputs.update(past_key_values=self._cache, use_cache=True)
        if isinstance(self._cache, WindowCache):
            inputs.update(self._cache.inputs(end - start, self.model.device, self.model.dtype))
        elif any(first > self._begin for first in self._first):
            # Without pads neither mask nor positions: the model takes its fast causal path.
            inputs.update(self._padding(start, end))
        return self.model(**inputs).logits[:, -1].float()

    @property
    def can_crop(self) -> bool:
        """Can the cache forget its latest tokens and nothing else?"""
        layers = getattr(self._cache, "layers", None)
        return hasattr(self._cache, "crop") and (
            layers is None or all(type(layer) is factory.FullLayer for layer in layers)
        )

    def draft_logits(self, draft: list[int]) -> Tensor:
        """Logits [1 + draft, vocab] in float32 after the only row's last token and after every guess behind it."""
        start, end = self.length - 1, self.length + len(draft)
        self.text[0, self.length : end] = torch.tensor(draft, dtype=torch.long)
        inputs: dict[str, object] = {"input_ids": self.text[:, start:end], "past_key_values": self._cache}
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = end - start
        return self.model(**inputs, use_cache=True).logits[0, start - end :].float()

    def accept(self, tokens: list[int]) -> None:
        """Append what is certain, and let the cache forget every guess that is not."""
        self.text[0, self.length : self.length + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        self.length += len(tokens)
        assert self._cache is not None, "only a cache goes back"
        self._cache.crop(self.length - 1)

    def _recomputed_from(self, start: int, end: int) -> int:
        """Where the pass begins when the window is computed anew: for every token, or with a cache when a row fills it."""
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
        """Forget all but the last `tokens` of rows that look back over more than the window."""
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
        if self.length == self.text.shape[1]:
            self._forget(self.length - self._window)
        self.text[:, self.length] = tokens
        self.length += 1

    def _forget(self, tokens: int) -> None:
        self.text[:, : self._window] = self.text[:, tokens:].clone()
        self._first = [max(0, first - tokens) for first in self._first]
        self._begin = max(0, self._begin - tokens)
        self.length -= tokens

    def branch(self, copies: int) -> None:
        """Continue every row `copies` times, side by side."""
        self._index([row for row in range(len(self._first)) for _ in range(copies)])
        if self._cache is not None:
            self._cache.batch_repeat_interleave(copies)

    def select(self, keep: list[int]) -> None:
        """Drop all rows but `keep`: later passes do not compute them."""
        self._index(keep)
        if self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(keep))

    def _index(self, rows: list[int]) -> None:
        self.text = self.text[rows]
        self._first = [self._first[row] for row in rows]
