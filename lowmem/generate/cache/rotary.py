"""How a model turns its keys with position, read off the model itself.

Rotary embeddings (RoPE, arXiv 2104.09864) turn pairs of a key's numbers by an angle that grows with the
position. Families differ in which numbers are pairs, how many of them turn and how fast, layer by layer.
Instead of a table of families, the model's keys for one token at several positions are compared with every
way of turning that its own frequencies allow: what reproduces them is what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowmem.models.config import read_shape

_ALIBI = frozenset({"bloom", "mpt"})
_GROWING = frozenset({"dynamic", "longrope"})
"""Kinds of RoPE whose frequencies change once a position lies beyond the original context."""

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest relative error of a reproduced key; a wrong way of turning is off by 10 % at the least."""

TOKENS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of keys [..., head_dim]: number j becomes k[j] cos(a f[j]) + k[partner[j]] s[j] sin(a f[j]).

    Args:
        frequencies: f in radians per position, float64 [head_dim]; 0 for numbers that do not turn.
        partners: int64 [head_dim].
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
        """`keys` [..., head_dim] moved on by `shifts` positions, which broadcast over all dimensions but the last."""
        cos, sin = (factor.to(keys.device) for factor in self.factors(shifts))
        wide = keys.float()
        return (wide * cos + self.mixed(wide) * sin).to(keys.dtype)

    def move(self, keys: Tensor, shifts: Tensor) -> None:
        """`keys` [..., tokens, head_dim] moved on in place, a few tokens at a time: a stream's memory must not grow for it."""
        for part in keys.split(TOKENS_AT_ONCE, dim=-2):
            part.copy_(self(part, shifts))

    def mixed(self, keys: Tensor) -> Tensor:
        """Every number's partner in its place."""
        return keys.index_select(-1, self.partners.to(keys.device))


def paired(inv_freq: Tensor, head_dim: int, interleaved: bool) -> Turn:
    """The turn of the first 2 * len(inv_freq) numbers: halves (j, j + n) as in Llama, or neighbours (2j, 2j + 1) as in GPT-J."""
    count = len(inv_freq)
    first = torch.arange(count) * 2 if interleaved else torch.arange(count)
    second = first + (1 if interleaved else count)
    frequencies, signs = torch.zeros(2, head_dim, dtype=torch.float64)
    partners = torch.arange(head_dim)
    for places, others, sign in ((first, second, -1.0), (second, first, 1.0)):
        frequencies[places], partners[places], signs[places] = inv_freq.double().cpu(), others, sign
    return Turn(frequencies, partners, signs)


_known: WeakKeyDictionary[nn.Module, tuple[Turn, ...] | None] = WeakKeyDictionary()


def key_turns(model: Any) -> tuple[Turn, ...] | None:
    """How each layer of `model` turns its keys; None where position enters in another way than by rotation.

    Costs one pass over four tokens, once for a model.
    """
    if model not in _known:
        _known[model] = _probe(model)
    return _known[model]


def context_limit(config: Any) -> int:
    """Tokens that the model was made to see at once, however its family names them (BLOOM, MPT)."""
    decoder = config.get_text_config(decoder=True)
    return int(getattr(decoder, "max_position_embeddings", None) or read_shape(decoder.to_dict()).context)


def position_limit(config: Any) -> int:
    """Positions below this one are what the model's rotation was made for, with frequencies that stay what they are."""
    decoder = config.get_text_config(decoder=True)
    limit = context_limit(config)
    given = getattr(decoder, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]
    for kind in kinds:
        original = kind.get("original_max_position_embeddings") or getattr(
            decoder, "original_max_position_embeddings", None
        )
        if kind.get("rope_type") in _GROWING and original:
            limit = min(limit, original)
    return int(limit)


def adds_position_to_scores(config: Any) -> bool:
    """Does position enter as a term beside the keys (ALiBi, arXiv 2108.12409), which goes by the order they lie in?"""
    decoder = config.get_text_config(decoder=True)
    return decoder.model_type in _ALIBI or bool(getattr(decoder, "alibi", False))


@torch.inference_mode()
def _probe(model: Any) -> tuple[Turn, ...] | None:
    decoder = model.config.get_text_config(decoder=True)
    if adds_position_to_scores(model.config):
        return None
    positions = torch.tensor([0, 1, 7, position_limit(model.config) - 1], device=model.device)
    # A token that sees only itself has the same hidden state wherever it stands: its keys differ by rotation alone.
    ids = torch.full((len(positions), 1), decoder.vocab_size // 2, device=model.device)
    cache = DynamicCache(config=model.config)
    try:
        model(input_ids=ids, position_ids=positions[:, None], past_key_values=cache, use_cache=True)
    except (TypeError, IndexError):  # no position ids to give, or a table that ends before
        return None
    shifts = positions.double().cpu()[:, None, None]
    turns = []
    for layer in cache.layers:
        stored: Tensor = layer.keys  # type: ignore[union-attr, assignment]  # every layer has just been given keys
        keys = stored.float().cpu()
        turn = _reproducing(keys, shifts, list(_candidates(model, keys.shape[-1])), TOLERANCES[stored.dtype])
        if turn is None:
            return None
        turns.append(turn)
    return tuple(turns)


def _reproducing(keys: Tensor, shifts: Tensor, candidates: list[Turn], tolerance: float) -> Turn | None:
    """The candidate that makes keys [positions, heads, 1, head_dim] of the first one, with the least error."""

    def error(turn: Turn) -> float:
        return float((turn(keys[:1], shifts) - keys).norm() / keys.norm())

    best = min(candidates, key=error, default=None)
    return best if best is not None and error(best) <= tolerance else None


def _candidates(model: Any, head_dim: int) -> Iterator[Turn]:
    yield paired(torch.zeros(0), head_dim, interleaved=False)  # layers without positions, as SmolLM3 has some
    for inv_freq in _frequencies(model):
        if 2 * len(inv_freq) <= head_dim:
            yield paired(inv_freq, head_dim, interleaved=False)
            yield paired(inv_freq, head_dim, interleaved=True)


def _frequencies(model: Any) -> Iterator[Tensor]:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            yield buffer
    rotary_dim = getattr(model.config.get_text_config(decoder=True), "rotary_dim", None)
    if rotary_dim:  # GPT-J and CodeGen keep a table of sines instead
        yield 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
