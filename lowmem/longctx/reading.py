"""Streams a long text through a model with any KV cache, as generation would, and reports NLL and time per token.

With a cache the text passes through it once. With a window but no cache, the window is recomputed for every token; to get
through a whole text that way, `RECOMPUTED_SHARE` of a window's tokens are scored per pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import BadInput, CorruptModel
from lowmem.events import CancelToken
from lowmem.generate.cache import policy
from lowmem.generate.cache.capability import cache_use
from lowmem.generate.cache.window import WindowCache
from lowmem.generate.decoding import cancellable, decoder_config, no_check, tidy_heap
from lowmem.generate.options import GenerateOptions
from lowmem.machine.monitor import trim_heap
from lowmem.measure.options import LOGITS_BYTES
from lowmem.messages import msg
from lowmem.models.cache_argument import cache_argument

CHUNK = 128
RECOMPUTED_SHARE = 0.25


class Reader:
    """Reads `ids` from the beginning through the KV cache described by `options`.

    Raises:
        BadInput: fewer than two tokens, or an invalid window.
        Unsupported: see `policy.make_cache`.
    """

    def __init__(self, model: Any, ids: Sequence[int], options: GenerateOptions) -> None:
        if len(ids) < 2:
            raise BadInput(
                msg("The text has {ids:,} tokens, too few to measure.", ids=len(ids)), msg("Use a longer text.")
            )
        self.model, self.options = model, options
        self._cache_argument = cache_argument(model)
        self.ids = torch.tensor([list(ids)], device=model.device)
        self.at = 0
        """Tokens read so far."""
        self.cache = None
        self._use = cache_use(model)
        if options.use_cache and self._use.cached:
            self.cache = policy.make_cache(model, options, rows=1, capacity=len(ids), pads=[0])
        self._recomputes = bool(options.window) and not isinstance(self.cache, WindowCache)
        if self._recomputes:
            self.cache = None
        vocabulary = decoder_config(model).vocab_size
        self._chunk = max(1, min(CHUNK, LOGITS_BYTES // (4 * vocabulary)))

    @torch.inference_mode()
    def read(
        self, until: int, cancel: CancelToken | None = None, check: Callable[[], None] = no_check
    ) -> Iterator[Tensor]:
        """Read up to token `until`; yields the NLL of each next token in nats, fp32 [tokens], pass by pass.

        Raises:
            CorruptModel, Cancelled.
        """
        cancel = cancel or CancelToken()
        with cancellable(list(self.model.modules()), cancel), tidy_heap(self.model):
            while self.at < until:
                check()
                # Logits of passes of different sizes leave holes, in which the next do not fit.
                trim_heap()
                yield self._pass(min(self._most(), until - self.at))

    @torch.inference_mode()
    def seconds_per_token(self, tokens: int) -> float:
        """Process one token at a time, as in generation; the median time of a pass."""
        times = []
        for _ in range(min(tokens, self.ids.shape[1] - self.at)):
            started = time.perf_counter()
            self._pass(1)
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2] if times else 0.0

    def _most(self) -> int:
        if self._recomputes:
            return max(1, int(self.options.window * RECOMPUTED_SHARE))
        return self._chunk if self._use.chunks or not self.at else 1

    def _pass(self, tokens: int) -> Tensor:
        inputs: dict[str, Any] = {"use_cache": False}
        start = self.at
        if isinstance(self.cache, WindowCache):
            tokens = self.cache.stream.most_tokens(tokens)
            inputs = self.cache.inputs(tokens, self.model.device, self.model.dtype)
        if self.cache is not None:
            inputs |= {self._cache_argument: self.cache, "use_cache": True}
        else:
            start = max(0, self.at + tokens - self.options.window) if self._recomputes else 0
        end = self.at + tokens
        logits = self.model(input_ids=self.ids[:, start:end], **inputs).logits[0, self.at - start :]
        targets = self.ids[0, self.at + 1 : end + 1]
        self.at = end
        logits = logits[: len(targets)].float()
        nll = logits.logsumexp(dim=-1) - logits.gather(1, targets[:, None])[:, 0]
        if bool(nll.isnan().any()):
            raise CorruptModel(
                msg("The model produced NaN logits within the first {end:,} tokens of the text.", end=end),
                msg("Choose another precision, such as fp32. If that does not help, the weights are damaged."),
            )
        return nll.cpu()

    def cache_bytes(self) -> int:
        """Bytes in use by the cache; allocated pages that were never written do not count."""
        return 0 if self.cache is None else cache_bytes(self.cache, self.at)


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes of keys, values and scales that a cache holds after `tokens` tokens, without scratch buffers."""
    total = 0
    for layer in cache.layers:
        if not getattr(layer, "is_initialized", False):
            continue
        filled = 1.0
        if hasattr(layer, "capacity"):
            filled = min(1.0, tokens / layer.capacity)
        elif hasattr(layer, "ring"):
            filled = min(1.0, tokens / layer.ring.slots)
        stores = layer._stores() if hasattr(layer, "_stores") else (layer.keys, layer.values)
        total += int(filled * sum(store.nbytes for store in stores))
    return total
