"""A KV cache layer of sparse attention: beside keys and values it holds what chooses the tokens that are attended to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem.generate.cache.full import FullLayer
from lowmem.generate.cache.storage import new_store


class IndexedLayer(FullLayer):
    """Keys and values of every token, and the keys of an indexer (DeepSeek-V3.2), in place as `FullLayer` holds its own."""

    def __init__(self, rows: int, capacity: int, **_: Any) -> None:
        super().__init__(rows, capacity)
        self._index: Tensor | None = None  # [rows, 1, capacity, width]
        self._indexed = 0
        self.indexer_position_ids: Tensor | None = None
        """[dimensions, batch, tokens]; set by families whose indexer rotates by them."""

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append keys [batch, tokens, width], and return a view of all of them."""
        batch, tokens, width = indexer_key_states.shape
        if self._index is None:
            self._index = new_store(indexer_key_states[:, None], (self.rows, 1, self.capacity, width))
        start, self._indexed = self._indexed, self._indexed + tokens
        keys = self._index[:batch, 0, : self._indexed]
        keys[:, start:] = indexer_key_states
        return keys

    def reset(self) -> None:
        super().reset()
        self._indexed, self.indexer_position_ids = 0, None

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        self._indexed = min(self._indexed, max_length)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :max_length]

    def _stores(self) -> tuple[Tensor, ...]:
        return super()._stores() if self._index is None else (*super()._stores(), self._index)

    def _take(self, rows: Tensor) -> None:
        super()._take(rows)
        if self.indexer_position_ids is not None and self.indexer_position_ids.shape[1] > 1:
            self.indexer_position_ids = self.indexer_position_ids.index_select(
                1, rows.to(self.indexer_position_ids.device)
            )
