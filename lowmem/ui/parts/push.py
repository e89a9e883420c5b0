"""Push a result to the hub, with a token typed for that one action."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from lowmem.events import Step
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import PRIVATE, QUICK, Jobs, notice, pump
from lowmem.ui.service.quantizing import Workshop

KIND = "push"


class PushBox:
    """Built where it stands in the layout."""

    def __init__(self, workshop: Workshop, jobs: Jobs, key: str = KIND) -> None:
        """`key` names its elements, for pages with several."""
        self.workshop, self.jobs = workshop, jobs
        with gr.Accordion(say("push"), open=False, visible=not workshop.engine.public, elem_id=key) as self.box:
            self.repo = gr.Textbox(
                label=say("push_repo"), placeholder=say("push_repo_hint"), max_length=200, elem_id=f"{key}-repo"
            )
            self.token = gr.Textbox(
                label=say("push_token"),
                info=say("push_token_help"),
                type="password",
                max_length=200,
                elem_id=f"{key}-token",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            self.private = gr.Checkbox(True, label=say("push_private"), elem_id=f"{key}-private")
            with gr.Row(elem_classes="lm-actions"):
                self.go = gr.Button(say("push"), size="sm", scale=0, min_width=140, elem_id=f"{key}-start")
                self.stop = gr.Button(say("stop"), size="sm", scale=0, min_width=80, elem_id=f"{key}-stop")
            self.told = gr.HTML(elem_id=f"{key}-notice")

    def wire(self, receipt: gr.State) -> None:
        """`receipt` holds the last quantization's receipt as a dict."""
        inputs = [receipt, self.repo, self.token, self.private]
        # The token leaves the page with the click and does not come back.
        self.go.click(self._push, inputs, [self.told, self.token], **PRIVATE)
        self.stop.click(self._stop, None, None, **QUICK)

    def shown(self, opened: Any) -> None:
        """Once the page is open, show what its visitor may do."""
        opened.then(lambda: gr.Accordion(visible=self.workshop.engine.access.owned), None, self.box, **QUICK)

    def _stop(self, request: gr.Request) -> None:
        self.jobs.stop(request, KIND)

    def _push(self, receipt: dict[str, Any] | None, repo: str, token: str, private: bool, request: gr.Request) -> Any:
        yield render.progress(Step(0, 0, say("pushing"))), ""
        folder = (receipt or {}).get("details", {}).get("folder", "")
        try:
            with self.jobs.running(request, KIND) as cancel:
                upload = (self.workshop.push(folder, repo, token, private, cancel) for _ in range(1))
                address = next(found for frame in pump(upload, cancel) for found in frame)
        except Exception as error:
            yield notice(error), ""
            return
        link = f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(address)}</a>'
        yield f'<p class="lm-notice" role="status">{say("pushed", address=link)}</p>', ""
