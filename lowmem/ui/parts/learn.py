"""A lesson at the foot of each tab: closed at first, then with the figures of the tab's model."""

from __future__ import annotations

import logging

import gradio as gr

from lowmem.messages import Message, msg
from lowmem.planning.plan import Plan
from lowmem.ui.html import learn as render_learn
from lowmem.ui.html.lessons import LESSONS
from lowmem.ui.language import Html
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.service.engine import AUTO, Choice, Engine

log = logging.getLogger("lowmem.ui")


class Learn:
    """Creates its components in the current layout.

    Args:
        key: the tab, of `LESSONS`.
        model: the dropdown with the tab's model, None where it is the resident one.
    """

    def __init__(self, engine: Engine, key: str, model: gr.Dropdown | None = None) -> None:
        self.engine, self.key = engine, key
        title = Message("{label}: {title}", label=msg("Learn"), title=LESSONS[key].title)
        with gr.Accordion(title, open=False, elem_id=f"learn-{key}", elem_classes="lm-learn-box") as box:
            text = gr.HTML(Html(lambda: render_learn.lesson(key, None, None)), elem_id=f"learn-{key}-text")
        inputs = [model] if model else None
        box.expand(self._lesson, inputs, text, **QUICK)
        if model:
            model.change(self._lesson, inputs, text, trigger_mode="always_last", **QUICK)

    def _lesson(self, model: str | None = None) -> str:
        try:
            return render_learn.lesson(self.key, self._plan((model or "").strip()), self.engine.last_receipt)
        except Exception as error:  # the tab itself reports the error
            log.debug("no figures for a lesson: %s", error)
            return render_learn.lesson(self.key, None, None)

    def _plan(self, model: str) -> Plan:
        """For the tab's model, else the resident one, else the one that is recommended."""
        resident = self.engine.resident
        if resident and model in ("", AUTO, resident.spec.ref):
            return resident
        return self.engine.plan(Choice(model=model or AUTO))
