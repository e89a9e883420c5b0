"""The whole page: header, sidebar, tabs. A new tab is one file and one line here."""

from __future__ import annotations

import gradio as gr

from lowmem.models.hub import reachable as hub_reachable
from lowmem.ui.api.core import add_endpoints
from lowmem.ui.api.export import add_export_endpoints
from lowmem.ui.api.longctx import add_longctx_endpoints
from lowmem.ui.api.offload import add_offload_endpoints
from lowmem.ui.api.quantize import add_workshop_endpoints
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.edge import Page
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import QUICK, Jobs
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import AUTO, Engine
from lowmem.ui.service.offloading import Depot
from lowmem.ui.service.quantizing import Workshop
from lowmem.ui.tabs.export import ExportTab
from lowmem.ui.tabs.generate import GenerateTab
from lowmem.ui.tabs.learn import Learn
from lowmem.ui.tabs.longctx import LongContextTab
from lowmem.ui.tabs.offload import OffloadTab
from lowmem.ui.tabs.quantize import QuantizeTab

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
    workshop: Workshop | None = None,
) -> Page:
    """The page over an engine.

    Args:
        engine: the real one by default.
        budget_bytes: the budget that the page starts with, for the computing device.
        model: the model that is proposed instead of the recommended one.
        workshop: what quantizes and compares; one over `engine` by default.
    """
    engine = engine or Engine()
    workshop = workshop or Workshop(engine)
    jobs = Jobs()
    with Page(title=say("title"), fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.HTML(render.header(), elem_id="header")
        hub = gr.HTML(elem_id="hub-notice")
        sidebar = Sidebar(engine, budget_bytes)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(say("generate"), id="generate"):
                generate = GenerateTab(engine, jobs, sidebar, model)
                Learn(engine, "generate")
            with gr.Tab(say("quantize"), id="quantize"):
                quantize = QuantizeTab(workshop, jobs, sidebar, tabs, generate.setup)
                Learn(engine, "quantize", quantize.form.model)
            depot = Depot(engine)
            with gr.Tab(say("offload"), id="offload") as offload_tab:
                offload = OffloadTab(depot, jobs, sidebar)
                Learn(engine, "offload", offload.model)
            with gr.Tab(say("longctx"), id="longctx"):
                longctx = LongContextTab(engine, jobs, sidebar)
                Learn(engine, "longctx")
            with gr.Tab(say("export"), id="export"):
                export = ExportTab(workshop, jobs, sidebar, tabs, generate.setup)
                Learn(engine, "export", export.model)
        add_endpoints(engine)
        add_workshop_endpoints(workshop)
        add_longctx_endpoints(engine)
        add_offload_endpoints(depot)
        add_export_endpoints(workshop)
        opened = sidebar.after(
            demo.load(lambda: render.machine(engine.hardware().line()), None, sidebar.machine, **QUICK)
        )
        generate.shown(opened).then(generate.setup.refusals, None, generate.setup.unavailable, **QUICK)
        opened.then(generate.setup.storage.shown, None, generate.setup.storage.box, **QUICK)
        quantize.shown(opened)
        offload.shown(opened)
        offload.opened(offload_tab)
        export.shown(opened)
        longctx.shown(opened)
        longctx.shown(sidebar.seen.change(lambda: None, None, None, **QUICK))
        # Said here once, and not with every model that cannot be had.
        opened.then(lambda: "" if hub_reachable() else render.quiet(say("no_hub")), None, hub, **QUICK)
        demo.load(None, js=SETTLE, **QUICK)
        demo.unload(jobs.leave)
    demo.queue(max_size=32)
    return demo
