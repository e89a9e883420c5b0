"""Cache layers of a fixed size per sequence: the states of recurrent layers and of short convolutions.

Mamba, gated delta nets, linear attention and short convolutions summarize everything they have read in a state that does
not grow. Hybrid layers keep such a state beside keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from lowmem.generate.cache.full import FullLayer


class StateLayer(LinearAttentionLayer):
    """The states of one layer, in the dtype in which the layer computes them."""

    device: Any
    dtype: Any

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """transformers' own also marks the states for torch's compiler, which loads it: 60 MB and a second."""
        if conv_states is not None:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = width
            self.conv_states[state_idx] = conv_states.new_zeros(*conv_states.shape[:-1], width)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.device = recurrent_states.device
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next(state.shape[0] for state in self.states())
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        self.reorder_cache(indices)

    def states(self) -> list[Tensor]:
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in held if state is not None]


class HybridLayer(StateLayer, FullLayer):  # type: ignore[override]  # as transformers' own hybrid layers
    """Keys and values of every token, and a state: layers that attend and recur side by side."""

    def __init__(self, rows: int, capacity: int, number_of_states: int = 1) -> None:
        FullLayer.__init__(self, rows, capacity)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:  # type: ignore[override]
        """Called with keys and values by position, with states by name."""
        if keys_and_values:
            FullLayer.lazy_initialization(self, *keys_and_values)
        else:
            StateLayer.lazy_initialization(self, **states)

    def get_max_length(self) -> int:
        return FullLayer.get_max_length(self)

    def reset(self) -> None:
        StateLayer.reset(self)
        FullLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        StateLayer.reorder_cache(self, beam_idx)
        FullLayer.reorder_cache(self, beam_idx)
