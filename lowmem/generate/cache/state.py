"""Cache layers of a fixed size per sequence: the states of recurrent layers and of short convolutions.

Mamba, gated delta nets, linear attention and short convolutions summarize everything they have read in a state that does
not grow. Hybrid layers keep such a state beside keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


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


class HybridLayer(StateLayer, CacheLayerMixin):  # type: ignore[override]  # as transformers' own hybrid layers
    """A state, and keys and values: layers that attend and recur side by side.

    Args:
        attention: the layer for keys and values, of any kind.
    """

    def __init__(self, attention: Any, number_of_states: int = 1) -> None:
        CacheLayerMixin.__init__(self)
        StateLayer.__init__(self, number_of_states)
        self.attention, self.is_sliding = attention, attention.is_sliding

    def update(self, *keys_and_values: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        seen: tuple[Tensor, Tensor] = self.attention.update(*keys_and_values, **more)
        return seen

    def get_seq_length(self) -> int:
        return int(self.attention.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.attention.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        return int(self.attention.get_max_length())

    def reset(self) -> None:
        StateLayer.reset(self)
        self.attention.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        StateLayer.reorder_cache(self, indices)
        self.attention.batch_select_indices(indices)
