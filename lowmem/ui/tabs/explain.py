"""How the methods work, in words and in pictures of the chosen model's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowmem.events import Step
from lowmem.plots import weights as pictures
from lowmem.plots.figure import to_svg
from lowmem.ui.html import plan as render
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import HEAVY, QUICK, Jobs, notice, pump
from lowmem.ui.service.quantizing import Workshop

KIND = "explain"
WIDTHS = (2, 3, 4, 8)
GROUP = 64


class ExplainView:
    """Built where it stands in the layout.

    Args:
        model: the dropdown with the chosen model.
        receipt: State with the last quantization's receipt as a dict, whose losses are drawn, too.
    """

    def __init__(self, workshop: Workshop, jobs: Jobs, model: gr.Dropdown, receipt: gr.State) -> None:
        self.workshop, self.jobs = workshop, jobs
        with gr.Column(elem_id="explain"):
            with gr.Row(elem_classes="lm-actions"):
                self.bits = gr.Radio(
                    [(str(bits), bits) for bits in WIDTHS], value=4, label=say("bits"), elem_id="explain-bits"
                )
                self.draw = gr.Button(say("draw"), variant="primary", scale=0, min_width=240, elem_id="explain-draw")
            self.progress = gr.HTML()
            self.notice = gr.HTML(elem_id="explain-notice")
            self.pictures = gr.HTML(elem_id="explain-pictures")
            gr.HTML(render_quantize.explanations())
        outputs = [self.draw, self.progress, self.notice, self.pictures]
        self.draw.click(self._begin, None, outputs[:3], **QUICK).then(
            self._run, [model, self.bits, receipt], outputs, **HEAVY
        )

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        return [gr.Button(interactive=False), render.progress(Step(0, 0, say("drawing"))), ""]

    def _run(self, model: str, bits: int, receipt: dict[str, Any] | None, request: gr.Request) -> Iterator[list[Any]]:
        found: dict[str, Any] | None = None
        trouble = ""
        try:
            with self.jobs.running(request, KIND) as token:
                for events in pump(self.workshop.look((model or "").strip(), int(bits), GROUP, token), token):
                    found = next((event for event in events if isinstance(event, dict)), found)
                    steps = [event for event in events if isinstance(event, Step)]
                    if steps:
                        yield [gr.skip(), render.progress(steps[-1]), gr.skip(), gr.skip()]
        except Exception as error:
            trouble = notice(error)
        yield [gr.Button(interactive=True), "", trouble, _drawn(found, receipt) if found else gr.skip()]


def _drawn(found: dict[str, Any], receipt: dict[str, Any] | None) -> str:
    sheets = [pictures.histogram(found)]
    title = (
        f"{say('loss_by_block')}: {found['model']}, round to nearest, {found['bits']} bits, groups of {found['group']}"
    )
    sheets.append(pictures.losses(found["losses"], title, say("loss_unit")))
    if receipt:
        losses = pictures.by_block(receipt["details"]["losses"])
        title = f"{say('loss_by_block')}: {receipt['model']}, {receipt['precision']}"
        sheets.append(pictures.losses(losses, title, say("loss_unit")))
    return "".join(render_quantize.drawing(to_svg(sheet)) for sheet in sheets)
