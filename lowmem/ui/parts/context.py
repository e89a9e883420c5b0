"""State shared by the tabs of a page, and the description of a tab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.engine import AUTO, Engine
from lowmem.ui.service.services import Services


@dataclass
class Context:
    """One page's services and the parts that every tab may use.

    Args:
        opened: the event after which a page that was just opened shows the machine.
        tabs, tab: the page's tabs, and the one that is being built.
        model: the model to propose first.
        load_result: (trigger, state) -> None; loads the result whose receipt `state` holds. Set by the Generate tab.
    """

    services: Services
    stop_tokens: StopTokens
    sidebar: Sidebar
    opened: Any = None
    tabs: gr.Tabs | None = None
    tab: gr.Tab | None = None
    model: str = AUTO
    load_result: Callable[[Any, gr.State], None] = lambda *_: None

    @property
    def engine(self) -> Engine:
        return self.services.engine

    def when_opened(self, show: Callable[..., Any], inputs: Any, outputs: Any, **settings: Any) -> Any:
        """Call `show` once a page has opened, as a handler of gradio's."""
        return self.opened.then(show, inputs, outputs, **settings) if self.opened else None


class Tab(NamedTuple):
    """A tab of the page: its id, its title, and the function that builds it."""

    key: str
    title: str
    build: Callable[[Context], Any]
