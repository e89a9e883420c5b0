"""The experts of a mixture, one after the other: each computes the tokens that its router sends to it.

transformers stacks the experts of a layer into three-dimensional parameters and lets `ExpertsInterface` choose how they are
computed. This implementation also takes a list of linear layers in place of a stacked parameter, one layer an expert, so
that experts can be held in any precision that has a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "lowmem"
"""The name of this implementation in `config._experts_implementation`."""


_OBSERVER = "lowmem_observer"


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum over the experts of each token, weighted by its router.

    Args:
        self: the experts' module, which names its layout: `has_gate`, `has_bias`, `is_transposed`.
        hidden_states: [tokens, hidden].
        top_k_index: chosen experts, [tokens, k]; the number of experts stands for none.
        top_k_weights: [tokens, k].
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    result = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in _chosen(top_k_index, count(getattr(self, first))):
        tokens, choice = _tokens(top_k_index, expert)
        states = linear(self, first, expert, hidden_states[tokens])
        states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
        states = linear(self, "down_proj", expert, states)
        if getattr(self, "has_post_expert_norm", False):
            states = self.post_expert_norm(states)
        states = states * top_k_weights[tokens, choice, None]
        result.index_add_(0, tokens, states.to(result.dtype))
    return result.to(hidden_states.dtype)


def linear(experts: Any, name: str, expert: int, states: Tensor) -> Tensor:
    """What the projection `name` of one expert makes of `states` [tokens, inputs]."""
    if observer := vars(experts).get(_OBSERVER):
        observer(name, expert, states)
    stacked = getattr(experts, name)
    if isinstance(stacked, nn.ModuleList):
        states = stacked[expert](states)
    elif experts.is_transposed:
        states = states @ stacked[expert]
    else:
        states = nn.functional.linear(states, stacked[expert])
    return states + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else states


@contextmanager
def observed(experts: nn.Module, observer: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Within the context, `observer` sees what every projection reads: its name, the expert, its inputs."""
    vars(experts)[_OBSERVER] = observer
    try:
        yield
    finally:
        del vars(experts)[_OBSERVER]


def count(stacked: nn.Parameter | nn.ModuleList) -> int:
    """Experts in a stacked parameter, or in the layers that took its place."""
    return len(stacked) if isinstance(stacked, nn.ModuleList) else stacked.shape[0]


class Concatenated(nn.ModuleList):
    """Layers that read the same input, as one layer with the outputs of all of them."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([layer(states) for layer in self], dim=-1)


def unstack(experts: nn.Module, name: str, pieces: int) -> None:
    """Replace the stacked projection `name` [experts, outputs, inputs] by linear layers without weights, one an expert.

    Args:
        pieces: layers of equal size whose outputs are those of an expert, in sequence: 2 for a gate and an up projection
            that are stacked together.
    """
    count, outputs, inputs = experts.get_parameter(name).shape
    if experts.is_transposed:
        outputs, inputs = inputs, outputs

    def layer() -> nn.Linear:
        return nn.Linear(inputs, outputs // pieces, bias=False, device="meta")

    made = [Concatenated(layer() for _ in range(pieces)) if pieces > 1 else layer() for _ in range(count)]
    delattr(experts, name)
    experts.add_module(name, nn.ModuleList(made))


def _chosen(top_k_index: Tensor, experts: int) -> list[int]:
    if top_k_index.is_meta:
        return [0]  # which experts are chosen is not known, only the shapes: as if all tokens chose the same
    return [expert for expert in torch.unique(top_k_index).tolist() if expert < experts]


def _tokens(top_k_index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens that chose an expert, and as which of their choices."""
    if top_k_index.is_meta:
        every = torch.empty(top_k_index.shape[0], dtype=torch.long, device="meta")
        return every, every
    tokens, choice = torch.where(top_k_index == expert)
    return tokens, choice


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, forward)
