"""A cache that never grows: the first few tokens, which attention leans on, and a window of the latest.

After StreamingLLM (arXiv 2309.17453): without its first tokens a model falls apart as soon as they leave the
window; with `sinks` of them kept it goes on for ever. It recalls nothing of what lies between. As in the
paper the sinks stand right before the window, so distances never exceed what the model has learnt. The paper
turns all keys anew for every token; here only the sinks are turned, up to where the window is, from their
first copies. Attention does not ask in which order keys lie, so a new token overwrites the oldest in place.

Positions stay below the model's own limit: when they come near it, the window is turned back to the
beginning, once in thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lowmem.longctx.rotation import Turn
from lowmem.planning.cache import LARGEST_CHUNK, MOST_SINK_COPIES


class Stream:
    """Where the rows of a batch are in their texts, and what one pass does to every ring of slots.

    A row's tokens count from 0; in a batch of unequal prompts, padded on the left, a row begins below 0.
    The position that the model is told is a token's number less the row's `base`.

    Args:
        pads: padding in front of each row.
        limit: positions the model can be told are below this.
    """

    def __init__(self, pads: Sequence[int], limit: int) -> None:
        self.seen = [-pad for pad in pads]
        self.read = 0
        """Tokens so far, padding counted: the same for all rows."""
        self.base = [0] * len(pads)
        self.limit = limit
        self.rings: list[Ring] = []
        self.tokens = 0
        """Of the pass that has begun, 0 between passes."""
        self.shifts: Tensor | None = None
        """Positions by which the rows' windows go back before this pass, float64 [rows, 1, 1], or None."""
        self.in_chunk = False

    @property
    def even(self) -> bool:
        """Are all rows at the same token?"""
        return len(set(self.seen)) == 1

    @property
    def span(self) -> int:
        return max(ring.slots for ring in self.rings)

    def most_tokens(self, wanted: int) -> int:
        """Tokens that the next pass may have."""
        room = min(ring.slots for ring in self.rings) - self.seen[0]
        if self.even and room > 0:
            return min(wanted, room)
        for ring in self.rings:
            if ring.sinks:
                wanted = min(wanted, ring.window, max(1, MOST_SINK_COPIES // ring.sinks))
        return max(1, min(wanted, LARGEST_CHUNK, self.limit - self.span))

    def begin(self, tokens: int) -> None:
        self.tokens = tokens
        self._keep_below_limit()
        fits = self.even and all(self.seen[0] + tokens <= ring.slots for ring in self.rings)
        self.in_chunk = tokens > 1 and not fits
        for ring in self.rings:
            ring.begin()

    def end(self) -> None:
        self.seen = [seen + self.tokens for seen in self.seen]
        self.read += self.tokens
        self.tokens = 0

    def _keep_below_limit(self) -> None:
        """Take the positions of rows that would pass the limit back to where their window is just full."""
        shifts = [0] * len(self.seen)
        for row, (seen, base) in enumerate(zip(self.seen, self.base, strict=True)):
            if seen - base + self.tokens > self.limit:
                shifts[row] = seen - self.span - base
                self.base[row] += shifts[row]
        self.shifts = torch.tensor(shifts, dtype=torch.float64)[:, None, None] if any(shifts) else None

    def numbers(self) -> Tensor:
        """The numbers of this pass's tokens in their texts, int64 [rows, tokens]."""
        return torch.tensor(self.seen)[:, None] + torch.arange(self.tokens)

    def positions(self) -> Tensor:
        """What the model is told, int64 [rows, tokens]; padding gets 0."""
        return self.numbers().clamp(min=0) - torch.tensor(self.base)[:, None]

    def select(self, rows: Sequence[int]) -> None:
        self.seen = [self.seen[row] for row in rows]
        self.base = [self.base[row] for row in rows]


class Ring:
    """Which slot holds which token, for all layers that keep the same `sinks` and `window`.

    Slots 0 to sinks - 1 hold the first tokens for ever, the others are overwritten in turn.
    """

    def __init__(self, stream: Stream, sinks: int, window: int) -> None:
        self.stream, self.sinks, self.window = stream, sinks, window
        self.slots = sinks + window
        self._factors: dict[Turn, tuple[Tensor, Tensor]] = {}
        self._writes: Tensor | None = None
        stream.rings.append(self)

    def begin(self) -> None:
        self._factors.clear()
        self._writes = None

    @property
    def appends(self) -> bool:
        """Do this pass's tokens go behind all others, and is nothing forgotten?"""
        stream = self.stream
        return not stream.in_chunk and stream.even and stream.seen[0] + stream.tokens <= self.slots

    def slot(self, number: int) -> int:
        return number if number < self.sinks else self.sinks + (number - self.sinks) % self.window

    def writes(self, device: torch.device) -> Tensor:
        """Row, token of the pass and slot of every token that is still remembered after the pass, int64 [3, tokens]."""
        if self._writes is None:
            last = self.stream.tokens
            found = [
                (row, token, self.slot(seen + token))
                for row, seen in enumerate(self.stream.seen)
                for token in range(max(0, -seen), last)
                if seen + token < self.sinks or token >= last - self.window
            ]
            self._writes = torch.tensor(found, dtype=torch.long).reshape(-1, 3).T.to(device)
        return self._writes

    def sink_factors(self, turn: Turn, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors that take first copies of the sinks to their place before the window, [rows, 1, tokens, 1, head_dim]."""
        if turn not in self._factors:
            moved = (self.stream.numbers() - (self.slots - 1)).clamp(min=0)
            shifts = moved.double() - torch.tensor(self.stream.base)[:, None]
            cos, sin = turn.factors(shifts[:, None, :, None])
            self._factors[turn] = cos.to(device), sin.to(device)
        return self._factors[turn]

    def mask(self) -> Tensor | None:
        """What each token of the pass sees, bool [rows, 1, tokens, keys]; None where it is all or plainly causal."""
        if self.stream.in_chunk:
            return self._chunk_mask()
        if self.stream.even:
            return None
        filled = torch.tensor(self.stream.seen) + 1
        if int(filled.min()) >= self.slots:
            return None
        return (torch.arange(self.slots) < filled[:, None])[:, None, None]

    def _chunk_mask(self) -> Tensor:
        """Over a copy of the sinks for each token, at its own distance, then the window's slots, then the chunk."""
        numbers = self.stream.numbers()
        rows, tokens = numbers.shape
        itself = torch.eye(tokens, dtype=torch.bool)
        stored = torch.arange(self.sinks) < numbers[:, :1]
        sinks = (itself[:, :, None] & stored[:, None, None]).reshape(rows, tokens, tokens * self.sinks)
        asking, held, new = numbers[:, :, None], self._held(numbers[:, :1])[:, None], numbers[:, None]
        window = (held >= 0) & (asking - held < self.window)
        chunk = (new >= 0) & (new <= asking) & ((asking - new < self.window) | (new < self.sinks))
        # Padding sees itself, or its states would be no numbers and spoil the sums of the others.
        return torch.cat([sinks, window, chunk | itself], dim=-1)[:, None]

    def _held(self, seen: Tensor) -> Tensor:
        """The number of the token in every slot of the window, int64 [rows, window], -1 in empty ones."""
        slot = torch.arange(self.window) + self.sinks
        behind = seen - 1 - slot
        return torch.where(behind >= 0, slot + self.window * behind.div(self.window, rounding_mode="floor"), -1)


class WindowLayer(CacheLayerMixin):
    """One layer's sinks and window: 2 * rows * heads * (sinks + window) * head_dim elements, and the sinks' first keys in fp32.

    Args:
        rows: most sequences the layer will ever hold at once.
        native: the model's own sliding layer.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, ring: Ring, rows: int, turn: Turn, native: bool = False) -> None:
        super().__init__()
        self.ring, self.rows, self.turn, self.is_sliding = ring, rows, turn, native
        self.first = self.last = False
        self.batch = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, slots, sinks = key_states.shape[1], self.ring.slots, self.ring.sinks
        # Zeros, since a masked slot still counts with its value times nothing.
        self.keys = key_states.new_zeros(self.rows, heads, slots, key_states.shape[-1])
        self.values = value_states.new_zeros(self.rows, heads, slots, value_states.shape[-1])
        self.first_keys = torch.zeros(
            self.rows, heads, sinks, key_states.shape[-1], device=key_states.device, dtype=torch.float32
        )
        self.mixed_keys = torch.zeros_like(self.first_keys)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens in; what they attend to, [batch, heads, keys, head_dim], in an order that `Ring.mask` knows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stream = self.ring.stream
        if self.first and not stream.tokens:
            stream.begin(key_states.shape[2])
        self.batch = key_states.shape[0]
        if stream.shifts is not None:
            self._move_back(stream.shifts)
        if self.ring.appends:
            seen = self._append(key_states, value_states)
        elif stream.in_chunk:
            seen = self._chunk(key_states, value_states)
        else:
            seen = self._overwrite(key_states, value_states)
        if self.last:
            stream.end()
        return seen

    def _move_back(self, shifts: Tensor) -> None:
        window = self.keys[: self.batch, :, self.ring.sinks :]
        window.copy_(self.turn(window, -shifts))

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        start = self.ring.stream.seen[0]
        end = start + keys.shape[2]
        self.keys[: self.batch, :, start:end] = keys
        self.values[: self.batch, :, start:end] = values
        if start < self.ring.sinks:
            self._remember_sinks(slice(0, self.batch), slice(start, min(end, self.ring.sinks)))
        return self.keys[: self.batch, :, :end], self.values[: self.batch, :, :end]

    def _overwrite(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stream, all_keys, all_values = self.ring.stream, self.keys[: self.batch], self.values[: self.batch]
        if stream.even:
            slot = self.ring.slot(stream.seen[0])
            all_keys[:, :, slot], all_values[:, :, slot] = keys[:, :, 0], values[:, :, 0]
        else:
            self._write(keys, values)
        if self.ring.sinks:
            all_keys[:, :, : self.ring.sinks] = self._turned_sinks()
        return all_keys, all_values

    def _chunk(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        sinks, tokens = self.ring.sinks, keys.shape[2]
        parts = [(self.keys[: self.batch, :, sinks:], self.values[: self.batch, :, sinks:]), (keys, values)]
        if sinks:
            parts.insert(0, self._sink_copies(keys.dtype, tokens, self.values[: self.batch, :, :sinks]))
        seen = torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)
        self._write(keys, values)
        return seen

    def _turned_sinks(self) -> Tensor:
        """The sinks' keys where the one token of this pass sees them, fp32 [batch, heads, sinks, head_dim]."""
        cos, sin = (factor[:, :, 0] for factor in self.ring.sink_factors(self.turn, self.first_keys.device))
        return (self.first_keys[: self.batch] * cos).addcmul_(self.mixed_keys[: self.batch], sin)

    def _sink_copies(self, dtype: torch.dtype, tokens: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """The sinks' keys where each token of this pass sees them, and `values` as often, [batch, heads, tokens * sinks, head_dim]."""
        cos, sin = self.ring.sink_factors(self.turn, self.first_keys.device)
        turned = self.first_keys[: self.batch, :, None] * cos + self.mixed_keys[: self.batch, :, None] * sin
        return turned.to(dtype).flatten(2, 3), values[:, :, None].expand(-1, -1, tokens, -1, -1).flatten(2, 3)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        rows, tokens, slots = self.ring.writes(keys.device)
        self.keys[rows, :, slots] = keys[rows, :, tokens]
        self.values[rows, :, slots] = values[rows, :, tokens]
        first = slots < self.ring.sinks
        if bool(first.any()):
            self._remember_sinks(rows[first], slots[first])

    def _remember_sinks(self, rows: Any, slots: Any) -> None:
        keys = self.keys[rows, :, slots].float()
        self.first_keys[rows, :, slots], self.mixed_keys[rows, :, slots] = keys, self.turn.mixed(keys)

    def get_seq_length(self) -> int:
        """The position of the next token."""
        return max(seen - base for seen, base in zip(self.ring.stream.seen, self.ring.stream.base, strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        keys = min(self.ring.stream.seen[0] + query_length, self.ring.slots)
        return keys, self.get_seq_length() + query_length - keys

    def get_max_length(self) -> int:
        return -1

    def _stores(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.first_keys, self.mixed_keys

    def take(self, rows: Tensor) -> None:
        """Make row i what `rows[i]` was."""
        self.batch = len(rows)
        for store in self._stores() if self.is_initialized else ():
            store[: self.batch] = store.index_select(0, rows.to(store.device))


class WindowCache(Cache):
    """The layers of a model, all of them windows, see `make_window_cache`."""

    def __init__(self, stream: Stream, layers: list[WindowLayer], kinds: Sequence[str], eager: bool) -> None:
        super().__init__(layers=list(layers))
        self.stream, self._windows = stream, layers
        layers[0].first = layers[-1].last = True
        self._rings = dict(zip(kinds, (layer.ring for layer in layers), strict=True))
        self._eager = eager

    def parts(self, tokens: int, chunk: int) -> Iterator[int]:
        """Split the next `tokens` into passes of at most `chunk`."""
        while tokens:
            part = self.stream.most_tokens(min(chunk, tokens))
            yield part
            tokens -= part

    def inputs(self, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Begin a pass over `tokens` more: what the model has to be told of masks and positions."""
        self.stream.begin(tokens)
        inputs: dict[str, Any] = {}
        if not self.stream.even:
            inputs["position_ids"] = self.stream.positions().to(device)
        masks = {kind: self._shaped(ring.mask(), device, dtype) for kind, ring in self._rings.items()}
        if any(mask is not None for mask in masks.values()):
            inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        return inputs

    def _shaped(self, mask: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if mask is None or not self._eager:
            return mask if mask is None else mask.to(device)
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min).to(device)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.stream.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self._windows:
            layer.take(indices)
        self.stream.select(indices.tolist())
