"""What gradio keeps of every open page, made small: a stranger opens pages by the thousand.

Gradio's own session holds a copy of the configuration of all components, 1 MB and 40 ms for this page, and is kept until
10,000 others have come.
"""

from __future__ import annotations

from collections import ChainMap
from types import SimpleNamespace
from typing import Any

from gradio.components import State
from gradio.state_holder import SessionState, StateHolder

CAPACITY = 4000
"""Sessions that are kept; the one that was used longest ago makes room."""

MOST_CLOSED = 32
"""Of these, pages that were closed; a browser may come back to one after a broken connection."""


class Session(SessionState):
    """A session that holds only what differs from the page as it was built."""

    def __init__(self, blocks: Any) -> None:
        super().__init__(SimpleNamespace(default_config=blocks.default_config, blocks={}))  # type: ignore[arg-type]
        whole = blocks.default_config
        self.blocks_config.blocks = ChainMap({}, whole.blocks)  # type: ignore[assignment]
        self.blocks_config.fns = ChainMap({}, whole.fns)  # type: ignore[assignment]

    # Gradio also keeps the configuration of every component as it is now, for links to the page in that state: this page
    # offers none, and describing one component takes a millisecond.

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(self.blocks_config.blocks.get(key), State):
            super().__setitem__(key, value)
            self.config_values.clear()
        else:
            self.blocks_config.blocks[key] = value

    def _update_config(self, key: int) -> None:
        pass

    def _update_value_in_config(self, key: int, value: Any) -> None:
        pass


class Sessions(StateHolder):
    """All sessions of a page."""

    def __getitem__(self, session_id: str) -> SessionState:
        if session_id not in self.session_data:
            self._forget_closed()
            self.session_data[session_id] = Session(self.blocks)
        return super().__getitem__(session_id)

    def _forget_closed(self) -> None:
        with self.lock:
            closed = [name for name, session in self.session_data.items() if session.is_closed]
            for name in closed[: max(0, len(closed) - MOST_CLOSED)]:
                del self.session_data[name]
                self.time_last_used.pop(name, None)
                # What was sent after its browser had left, which nobody will read.
                self.blocks._queue.pending_messages_per_session.pop(name, None)
