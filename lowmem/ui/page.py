"""The whole page: header, sidebar, tabs, endpoints."""

from __future__ import annotations

import gradio as gr

from lowmem.messages import msg
from lowmem.models.hub import reachable as hub_reachable
from lowmem.ui import tabs
from lowmem.ui.api.publish import publish
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html, Page
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.engine import AUTO, Engine
from lowmem.ui.service.services import Services

MOST_EVENTS = 1000
"""In gradio's queue, where an event only waits for a thread: those that wait for the model have a place in a `Lane`."""

# Gradio opens the sidebar over the whole of a phone's screen.
SETTLE = """() => {
    const toggle = document.querySelector('#sidebar.open .toggle-button');
    if (window.innerWidth <= 768 && toggle) toggle.click();
    setTimeout(() => document.body.classList.add('lm-settled'), 350);
    document.documentElement.lang = document.querySelector('.lm-header')?.lang || 'en';
}"""


def build_ui(
    engine: Engine | None = None,
    *,
    budget_bytes: int | None = None,
    model: str = AUTO,
    services: Services | None = None,
) -> Page:
    """The page over an engine.

    Args:
        engine: the real one by default.
        budget_bytes: the initial budget of the computing device.
        model: the model to propose instead of the recommended one.
        services: in place of the usual ones over `engine`.
    """
    services = services or Services(engine or Engine())
    engine, stop_tokens = services.engine, StopTokens()
    with Page(title="lowmem", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.HTML(Html(lambda: render.header()), elem_id="header")
        hub = gr.HTML(elem_id="hub-notice")
        sidebar = Sidebar(engine, budget_bytes)
        loaded = demo.load(lambda: render.machine(engine.hardware().line()), None, sidebar.machine, **QUICK)
        context = Context(services, stop_tokens, sidebar, sidebar.after(loaded), model=model)
        with gr.Tabs(elem_id="tabs") as context.tabs:
            for tab in tabs.TABS:
                with gr.Tab(tab.title, id=tab.key) as context.tab:
                    tab.build(context)
        publish(services)
        # Said once here, not with every model that cannot be fetched.
        context.when_opened(
            lambda: (
                ""
                if hub_reachable()
                else parts.quiet(
                    msg("The hub cannot be reached. Models on this machine, the demo and .gguf files still work.")
                )
            ),
            None,
            hub,
            **QUICK,
        )
        demo.load(None, js=SETTLE, **QUICK)
        demo.unload(stop_tokens.leave)
    demo.queue(max_size=MOST_EVENTS)
    return demo
