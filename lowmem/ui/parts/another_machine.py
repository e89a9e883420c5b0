"""Planning for a machine that is not here: a card or a size of GPU memory, and the table of what runs on which."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowmem.fields import build
from lowmem.machine.described import CARDS, short_name
from lowmem.measure.rows import write_atomically
from lowmem.messages import msg
from lowmem.planning.what_runs import to_csv
from lowmem.plots.figure import to_png
from lowmem.plots.what_runs import picture
from lowmem.ui.html import described as render
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.models import model_dropdown, with_automatic
from lowmem.ui.service.described import DescribedRequest
from lowmem.ui.service.engine import AUTO
from lowmem.ui.service.results import new_folder

BY_SIZE = ""


class AnotherMachine:
    """An accordion with its controls and plan. It has no button to load: the plan cannot be run here."""

    def __init__(self, context: Context) -> None:
        self.service = context.services.described
        with gr.Accordion(msg("Plan for another machine"), open=False, elem_id="another-machine") as self.box:
            with gr.Row():
                self.gpu = gr.Dropdown(
                    [(msg("Any GPU of this size"), BY_SIZE), *((card.name, short_name(card)) for card in CARDS)],
                    value=BY_SIZE,
                    label=msg("GPU"),
                    info=msg("Nothing is measured; bandwidths are those of the data sheet."),
                    elem_id="another-gpu",
                    min_width=260,
                )
                self.model = model_dropdown(with_automatic(context.engine), "another-model", AUTO, min_width=260)
            with gr.Row():
                self.vram = gr.Slider(
                    2,
                    80,
                    value=6,
                    step=1,
                    label=msg("GPU memory, GB"),
                    elem_id="another-vram",
                    min_width=220,
                    buttons=[],
                )
                self.ram = gr.Slider(
                    4, 256, value=16, step=4, label=msg("RAM, GB"), elem_id="another-ram", min_width=220, buttons=[]
                )
            self.plan = gr.HTML(elem_id="another-plan")
            self.install = gr.Code(
                label=msg("To install there, in lowmem's folder"),
                language=None,  # the colors of a shell have too little contrast
                interactive=False,
                show_line_numbers=False,
                wrap_lines=True,
                buttons=["copy"],
                elem_id="another-install",
            )
            self.button = gr.Button(msg("What runs on 4, 6, 8, 12, 16, 24 GB"), size="sm", elem_id="what-runs")
            self.table = gr.HTML(elem_id="what-runs-table")
            with gr.Row(visible=False, elem_classes="lm-actions") as self.files:
                self.csv = gr.DownloadButton(
                    msg("Download CSV"), size="sm", scale=0, min_width=150, elem_id="what-runs-csv"
                )
                self.png = gr.DownloadButton(
                    msg("Download PNG"), size="sm", scale=0, min_width=150, elem_id="what-runs-png"
                )
        self._wire()

    def _wire(self) -> None:
        controls: list[Any] = [self.gpu, self.model, self.vram, self.ram]
        outputs = [self.plan, self.install]
        self.box.expand(self.view, controls, outputs, **QUICK)
        for control in controls:
            control.change(self.view, controls, outputs, trigger_mode="always_last", **QUICK)
        self.gpu.change(lambda gpu: gr.Slider(visible=gpu == BY_SIZE), self.gpu, self.vram, **QUICK)
        self.button.click(self.show_table, self.ram, [self.table, self.files, self.csv, self.png], **QUICK)

    def view(self, gpu: str, model: str | None, vram: float, ram: float) -> list[Any]:
        """The plan and the command that installs what it needs."""
        size = "" if gpu else f"{vram}G"
        values = {"gpu": gpu, "model": (model or AUTO).strip(), "vram": size, "ram": f"{ram}G"}
        try:
            found = self.service.plan(build(DescribedRequest, values))
        except Exception as error:
            return [notice(error, toast=False), gr.Code(visible=False)]
        return [render.card(found), gr.Code(found.install, visible=found.speed is not None)]

    def show_table(self, ram: float) -> list[Any]:
        """The table, and the table and its picture as files."""
        cells = self.service.what_runs(f"{ram}G")
        folder = new_folder("what-runs")
        csv = write_atomically(folder / "what-runs.csv", to_csv(cells))
        png = write_atomically(folder / "what-runs.png", to_png(picture(cells)))
        return [
            render.table(cells),
            gr.Row(visible=True),
            gr.DownloadButton(value=str(csv)),
            gr.DownloadButton(value=str(png)),
        ]
