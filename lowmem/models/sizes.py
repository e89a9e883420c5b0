"""Holding the numbers of a configuration against the tensors of its files, before anything is built of them.

What config.json says is what transformers would build: a billion layers as readily as thirty. The headers of the files bound
what can be true, without knowing families: a model has no more layers than tensors, no more experts than the longest side of a
tensor, and no width far beyond that. What passes is built in a process with limits of time and memory (`derive.py`), and the
shape of every tensor is compared there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.foreign import AGAIN, short
from lowmem.models.tensors import Tensor

LARGEST = 2**40
"""No integer of a configuration is larger, whatever it means."""

PACKED = 32
"""How many times longer than a packed tensor a side of the weight can be that it stands for: codes of 1 bit in int32."""

WIDTH, EXPERTS, LAYERS = 2**20, 1024, 256
"""Numbers up to these pass, whatever the files hold: configurations also describe parts that a model does not have."""

DEPTH = 16
"""Objects within objects of a configuration."""

_NEEDED = ("num_hidden_layers", "hidden_size", "vocab_size")
_LAYERS_OF_TEXT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|(\w+_)?(layers|depths?)")
_EXPERTS = re.compile(r"(\w+_)?experts")
_WIDTHS = re.compile(r"(\w+_)?(sizes?|dims?|heads?|rank|width|channels)|n_embd|n_inner|d_\w+|vocab\w*")


def check_sizes(config: Mapping[str, Any], name: str, tensors: Sequence[Tensor] | None) -> None:
    """Refuse a configuration whose numbers cannot be those of a model.

    Args:
        name: of the model, for messages.
        tensors: what its files hold; None if there are no files.

    Raises:
        CorruptModel: naming key, number and what the files hold.
    """
    for part in (config, config.get("text_config")):
        for key in _NEEDED:
            if isinstance(part, Mapping) and key in part and not (type(part[key]) is int and part[key] > 0):
                raise _wrong(name, key, part[key])
    numbers = list(_numbers(config, name, DEPTH))
    for key, value, _ in numbers:
        if abs(value) >= LARGEST:
            raise _wrong(name, key, value)
    if tensors is None:
        return
    layers, longest = _layers(tensors), max((side for one in tensors for side in one.shape), default=0)
    for key, value, of_text in numbers:
        # Some models pass through the same layers several times, but none has more passes than tensors.
        most = min(layers, len(tensors)) if of_text and key in _LAYERS_OF_TEXT else layers
        if _LAYERS.fullmatch(key) and value > most:
            raise CorruptModel(
                msg(
                    "config.json of {name} names {value:,} layers ({key}), but its files hold at most {most:,}.",
                    name=name,
                    key=key,
                    value=value,
                    most=most,
                ),
                AGAIN,
            )
        most = max(EXPERTS, longest) if _EXPERTS.fullmatch(key) else max(WIDTH, PACKED * longest)
        if (_EXPERTS.fullmatch(key) or _WIDTHS.fullmatch(key)) and value > most:
            raise CorruptModel(
                msg(
                    "config.json of {name} has {key} = {value:,}, but no tensor of its files is longer than {longest:,}.",
                    name=name,
                    key=key,
                    value=value,
                    longest=longest,
                ),
                AGAIN,
            )


def _numbers(config: Mapping[str, Any], name: str, depth: int, of_text: bool = True) -> Iterator[tuple[str, int, bool]]:
    """Every integer at any depth: the key of it or of its list, its value, and whether it is about the text model."""
    for key, value in config.items():
        yield from _within(key, value, name, depth, of_text)


def _within(key: str, value: Any, name: str, depth: int, of_text: bool) -> Iterator[tuple[str, int, bool]]:
    if not depth:
        raise CorruptModel(msg("config.json of {name} is nested too deeply.", name=name), AGAIN)
    if isinstance(value, Mapping):
        yield from _numbers(value, name, depth - 1, of_text and key == "text_config")
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _within(key, one, name, depth - 1, of_text)
    elif type(value) is int:
        yield key[:80], value, of_text


def _wrong(name: str, key: str, value: object) -> CorruptModel:
    return CorruptModel(
        msg("config.json of {name} has {key} = {value}.", name=name, key=key, value=short(value)), AGAIN
    )


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _layers(tensors: Sequence[Tensor]) -> int:
    """The most layers of any part: as many as there are numbers in the tensors' names, or `LAYERS`."""
    return max(LAYERS, len({number for tensor in tensors for number in _NUMBER.findall(tensor.name)}))
