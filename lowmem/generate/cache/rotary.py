"""Detects how each layer of a model rotates its keys with position.

Rotary embeddings (RoPE, arXiv 2104.09864) rotate pairs of a key's elements by an angle that grows with the position.
Model families differ in which elements form a pair, how many are rotated, and how fast, possibly layer by layer. Instead
of keeping a table of families, this compares the model's keys for one token at several positions with every rotation
that the model's own frequencies allow, and takes the one that reproduces them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowmem.models.cache_argument import cache_argument
from lowmem.models.meta_model import context_limit

_ALIBI = frozenset({"bloom", "mpt"})
_GROWING = frozenset({"dynamic", "longrope"})
"""RoPE types whose frequencies change beyond the original context."""

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest relative error of a reproduced key; a wrong rotation is off by at least 10 %."""

TOKENS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of keys [..., head_dim] by p positions: element j becomes k[j] cos(p f[j]) + k[partner[j]] s[j] sin(p f[j]).

    Args:
        frequencies: f in radians per position, float64 [head_dim]; 0 for elements that are not rotated.
        partners: index of the other element of each pair, int64 [head_dim].
        signs: s, float64 [head_dim].
    """

    frequencies: Tensor
    partners: Tensor
    signs: Tensor

    def factors(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """cos and s * sin, float32 [..., head_dim], for float64 `shifts` [...] in positions."""
        angles = shifts[..., None] * self.frequencies
        return angles.cos().float(), (angles.sin() * self.signs).float()

    def __call__(self, keys: Tensor, shifts: Tensor) -> Tensor:
        """`keys` [..., head_dim] rotated by `shifts` positions, which broadcast over all dimensions but the last."""
        cos, sin = (factor.to(keys.device) for factor in self.factors(shifts))
        wide = keys.float()
        return (wide * cos + self.swap_pairs(wide) * sin).to(keys.dtype)

    def rotate_in_place(self, keys: Tensor, shifts: Tensor) -> None:
        """Rotate `keys` [..., tokens, head_dim] by `shifts`, a few tokens at a time so that peak memory does not grow."""
        for part in keys.split(TOKENS_AT_ONCE, dim=-2):
            part.copy_(self(part, shifts))

    def swap_pairs(self, keys: Tensor) -> Tensor:
        """`keys` with the two elements of every pair swapped."""
        return keys.index_select(-1, self.partners.to(keys.device))


def paired_rotation(inv_freq: Tensor, head_dim: int, interleaved: bool) -> Rotation:
    """A rotation of the first 2 * n elements, n = len(inv_freq), with pairs (j, j + n) as in Llama or, if `interleaved`,
    (2j, 2j + 1) as in GPT-J.
    """
    count = len(inv_freq)
    first = torch.arange(count) * 2 if interleaved else torch.arange(count)
    second = first + (1 if interleaved else count)
    frequencies, signs = torch.zeros(2, head_dim, dtype=torch.float64)
    partners = torch.arange(head_dim)
    for places, others, sign in ((first, second, -1.0), (second, first, 1.0)):
        frequencies[places], partners[places], signs[places] = inv_freq.double().cpu(), others, sign
    return Rotation(frequencies, partners, signs)


_known: WeakKeyDictionary[nn.Module, tuple[Rotation | None, ...] | None] = WeakKeyDictionary()


def key_rotations(model: Any) -> tuple[Rotation | None, ...] | None:
    """The rotation of each layer of `model`; None if the model encodes positions in another way.

    Costs one forward pass over four tokens, once per model.
    """
    if model not in _known:
        _known[model] = _probe(model)
    return _known[model]


def position_limit(config: Any) -> int:
    """Upper bound (exclusive) of the position ids for which the model's rotation frequencies are constant."""
    decoder = config.get_text_config(decoder=True)
    limit = context_limit(decoder)
    rope = getattr(decoder, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    for kind in kinds:
        original = kind.get("original_max_position_embeddings") or getattr(
            decoder, "original_max_position_embeddings", None
        )
        if kind.get("rope_type") in _GROWING and original:
            limit = min(limit, original)
    return int(limit)


def adds_position_to_scores(config: Any) -> bool:
    """Whether positions enter as a bias on the attention scores (ALiBi, arXiv 2108.12409), which depends on key order."""
    decoder = config.get_text_config(decoder=True)
    return decoder.model_type in _ALIBI or bool(getattr(decoder, "alibi", False))


@torch.inference_mode()
def _probe(model: Any) -> tuple[Rotation | None, ...] | None:
    decoder = model.config.get_text_config(decoder=True)
    if adds_position_to_scores(model.config):
        return None
    positions = torch.tensor([0, 1, 7, position_limit(model.config) - 1], device=model.device)
    # A token that attends only to itself has the same hidden state at every position: its keys differ by rotation alone.
    ids = torch.full((len(positions), 1), decoder.vocab_size // 2, device=model.device)
    cache = DynamicCache(config=model.config)
    try:
        model(input_ids=ids, position_ids=positions[:, None], use_cache=True, **{cache_argument(model): cache})
    except (TypeError, IndexError):  # no position ids, or a table of positions that ends earlier
        return None
    shifts = positions.double().cpu()[:, None, None]
    rotations: list[Rotation | None] = []
    for layer in cache.layers:
        stored = getattr(layer, "keys", None)
        if stored is None:  # a layer without keys
            rotations.append(None)
            continue
        keys = stored.float().cpu()
        rotation = _reproducing(keys, shifts, list(_candidates(model, keys.shape[-1])), TOLERANCES[stored.dtype])
        if rotation is None:
            return None
        rotations.append(rotation)
    return tuple(rotations)


def _reproducing(keys: Tensor, shifts: Tensor, candidates: list[Rotation], tolerance: float) -> Rotation | None:
    """The candidate that best reproduces `keys` [positions, heads, 1, head_dim] from the first position, if within `tolerance`."""

    def error(rotation: Rotation) -> float:
        return float((rotation(keys[:1], shifts) - keys).norm() / keys.norm())

    best = min(candidates, key=error, default=None)
    return best if best is not None and error(best) <= tolerance else None


def _candidates(model: Any, head_dim: int) -> Iterator[Rotation]:
    yield paired_rotation(
        torch.zeros(0), head_dim, interleaved=False
    )  # layers without positional encoding, as some of SmolLM3's
    for inv_freq in _frequencies(model):
        if 2 * len(inv_freq) <= head_dim:
            yield paired_rotation(inv_freq, head_dim, interleaved=False)
            yield paired_rotation(inv_freq, head_dim, interleaved=True)


def _frequencies(model: Any) -> Iterator[Tensor]:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            yield buffer
    rotary_dim = getattr(model.config.get_text_config(decoder=True), "rotary_dim", None)
    if rotary_dim:  # GPT-J and CodeGen store a table of sines instead
        yield 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
