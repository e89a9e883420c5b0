"""The Offload tab: run models that do not fit, with the place of every block and the time per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import msg
from lowmem.offload.estimate import SpeedEstimate
from lowmem.planning.plan import Plan
from lowmem.ui.html import offload as render_offload
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.parts.estimate import EstimateView, updates
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import TEXT_LIMIT, bounded
from lowmem.ui.parts.learn import Learn
from lowmem.ui.parts.models import model_dropdown
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.service.offload import MOST_SEQUENCES, MOST_TOKENS, OffloadRequest
from lowmem.ui.service.prompts import joined
from lowmem.units import GB

AUTO, DISK, CHOOSE = "auto", "disk", "choose"
SMALLEST_GB = 0.3


class OffloadTab:
    """Layout and wiring of the tab."""

    def __init__(self, context: Context) -> None:
        self.service, self.access = context.services.offload, context.engine.access
        with gr.Row(elem_id="offload"):
            with gr.Column(scale=3, min_width=300):
                self._build_controls()
                self.single = ButtonRunner(context, "offload", msg("Load and run"))
                self.live = gr.HTML(elem_id="offload-live")
                self.text = gr.Textbox(
                    label=msg("Continuation"), lines=3, max_lines=16, interactive=False, elem_id="offload-text"
                )
                self.measured = gr.HTML(elem_id="offload-measured")
            with gr.Column(scale=2, min_width=300, elem_id="offload-side"):
                self.problem = gr.HTML(elem_id="offload-problem")
                self.picture = gr.HTML(elem_id="offload-picture")
                self.again = gr.Button(
                    msg("Measure speed"), size="sm", visible=not self.access.public, elem_id="offload-again"
                )
        with gr.Column(elem_id="offload-methods"):
            gr.HTML(
                Html(
                    lambda: render_offload.section(
                        msg("Offloading methods side by side"),
                        msg(
                            "Runs the text above with each method in its own process: no offloading, blocks in RAM, blocks on disk, disk without the page cache, half in RAM and half on disk, and disk offload by accelerate."
                        ),
                    )
                )
            )
            self.comparison = ButtonRunner(context, "offload-compare", msg("Compare all methods"))
            self.table = gr.HTML(elem_id="offload-table")
            self.plot = gr.HTML(elem_id="offload-plot")
        Learn(context.engine, "offload", self.model)
        self._wire(context)

    def _build_controls(self) -> None:
        limits = MemoryBudget.detect(self.service.engine.hardware())
        self.model = model_dropdown(
            self.service.engine.catalog(), "offload-model", info=msg("Weights are streamed in their stored precision.")
        )
        with gr.Row():
            self.vram = _budget(limits.vram, msg("GPU memory budget, GB"), "offload-vram")
            self.ram = _budget(limits.ram, msg("RAM budget, GB"), "offload-ram")
        self.where = gr.Radio(
            [(msg("As the budget allows"), AUTO), (msg("All on disk"), DISK), (msg("Selected blocks"), CHOOSE)],
            value=AUTO,
            label=msg("Blocks"),
            elem_id="offload-where",
        )
        with gr.Row(visible=False) as self.lists:
            self.disk_list = _list(msg("Blocks on disk"), "offload-disk-list")
            self.ram_list = _list(msg("Blocks in RAM"), "offload-ram-list", visible=limits.vram is not None)
        self.prompt = gr.Textbox(
            "The history of the steam engine begins",
            label=msg("Text to continue"),
            lines=2,
            max_lines=8,
            max_length=TEXT_LIMIT,
            elem_id="offload-prompt",
        )
        with gr.Row():
            self.tokens = gr.Slider(
                1,
                MOST_TOKENS,
                value=16,
                step=1,
                label=msg("New tokens"),
                info=msg("Each token reads all weights once."),
                elem_id="offload-tokens",
                min_width=220,
                buttons=[],
            )
            self.sequences = gr.Slider(
                0,
                MOST_SEQUENCES,
                value=1,
                step=1,
                label=msg("Sequences in parallel"),
                info=msg("One pass over the weights serves all sequences. 0 = automatic."),
                elem_id="offload-answers",
                min_width=220,
                buttons=[],
            )

    def _wire(self, context: Context) -> None:
        self.controls: list[Any] = [
            self.model, self.ram, self.vram, self.where, self.disk_list, self.ram_list, self.sequences,
        ]  # fmt: skip
        outputs = (self.picture, self.single.button, self.problem)
        self.estimate = EstimateView(context, self.controls, outputs, self._estimate)
        for change in self.estimate.changes:
            self._measure_after(change)
        self.where.change(lambda where: gr.Row(visible=where == CHOOSE), self.where, self.lists, **QUICK)
        self.again.click(lambda: gr.Button(msg("Measuring ..."), interactive=False), None, self.again, **QUICK).then(
            self._measure_again, self.controls, [*outputs, self.again], **QUICK
        )
        context.when_opened(lambda: gr.Button(visible=self.access.owned), None, self.again, **QUICK)
        inputs = [self.prompt, self.tokens, *self.controls]
        ran = self.single.wire(inputs, [self.live, self.text, self.measured], self._run)
        self._measure_after(self.estimate.after(ran))
        self.comparison.wire(inputs, [self.table, self.plot], self._compare)
        if context.tab:  # opening the tab measures this machine, unless it was measured before
            self._measure_after(context.tab.select(self.estimate.update, self.controls, list(outputs), **QUICK))

    def _measure_after(self, event: Any) -> None:
        event.then(self._measure, self.controls, self.picture, **QUICK)

    def _request(self, values: Sequence[Any]) -> OffloadRequest:
        model, ram, vram, where, disk, in_ram, sequences = values
        disk, in_ram = {AUTO: ("", ""), DISK: ("all", "")}.get(where, (disk or "", in_ram or ""))
        values_by_name = {
            "model": (model or "").strip(),
            "disk_blocks": disk,
            "ram_blocks": in_ram,
            "num_return_sequences": sequences,
        }
        budget = MemoryBudget(_limit(ram, self.ram.maximum), _limit(vram, self.vram.maximum))
        return replace(build(OffloadRequest, values_by_name), budget=budget)

    def _estimate(self, *values: Any) -> tuple[str, bool, str]:
        plan = self.service.plan(self._request(values))
        over = plan.verdict == "over"
        return self._picture(plan, self.service.speed(plan)), over, parts.quiet(plan.sentence()) if over else ""

    def _picture(self, plan: Plan, speed: SpeedEstimate | None) -> str:
        return render_offload.picture(plan, speed, here=self.service.here(plan))

    def _measure(self, *values: Any) -> Any:
        """The picture with a prediction, where there was none."""
        try:
            plan = self.service.plan(self._request(values))
            if self.service.speed(plan) is None and (speed := self.service.measure(plan)):
                return self._picture(plan, speed)
        except Exception:
            pass  # `_estimate` shows the error
        return gr.skip()

    def _measure_again(self, *values: Any) -> list[Any]:
        def estimate(*values: Any) -> tuple[str, bool, str]:
            self.service.measure(self.service.plan(self._request(values)), again=True)
            return self._estimate(*values)

        return [*updates(estimate, values), gr.Button(msg("Measure speed"), interactive=True)]

    def _run(self, token: CancelToken, prompt: str, tokens: float, *values: Any) -> tuple[Iterator[Any], View]:
        bounded(prompt)
        texts: dict[int, str] = {}
        latest: dict[str, Any] = {}

        def view(events: Sequence[Any]) -> list[Any]:
            for event in events:
                if isinstance(event, Chunk):
                    texts[event.index] = texts.get(event.index, "") + event.text
                    latest["live"] = render.live(event)
                elif isinstance(event, Completion):
                    texts[event.index] = event.text
                elif isinstance(event, Receipt):
                    latest["receipt"] = render_offload.measured(event)
            return [latest.get("live", ""), joined(texts), latest.get("receipt", "")]

        return _counted(self.service.run(self._request(values), prompt, int(tokens), token), int(tokens)), view

    def _compare(self, token: CancelToken, prompt: str, tokens: float, *values: Any) -> tuple[Iterator[Any], View]:
        bounded(prompt)
        rows: list[dict[str, Any]] = []
        title = str(values[0])

        def view(events: Sequence[Any]) -> list[Any]:
            rows.extend(event for event in events if isinstance(event, dict))
            return [render_offload.comparison(rows), render_offload.plot(rows, title)]

        return self.service.compare(self._request(values), prompt, int(tokens), token), view


def _counted(events: Iterator[Any], tokens: int) -> Iterator[Any]:
    """Tokens as progress, too: each may take seconds."""
    for event in events:
        if isinstance(event, Chunk):
            yield Step(event.new_tokens, tokens, msg("Generating"), "tokens")
        yield event


def _budget(most: int | None, label: str, elem_id: str) -> gr.Slider:
    """A slider in gigabytes up to the total; hidden if the machine has no such memory."""
    top = max(SMALLEST_GB + 0.1, int((most or 0) / GB * 20) / 20)
    return gr.Slider(
        SMALLEST_GB, top, value=top, step=0.05, label=label, visible=most is not None, elem_id=elem_id, buttons=[]
    )


def _list(label: str, elem_id: str, *, visible: bool = True) -> gr.Textbox:
    return gr.Textbox(
        "", label=label, info=msg("Numbers and ranges such as 0-5,9; or all."), visible=visible, elem_id=elem_id
    )


def _limit(gigabytes: float, top: float) -> int | None:
    """None at the slider's end: all free memory."""
    return None if gigabytes >= top else round(gigabytes * GB)


TAB = Tab("offload", msg("Offload"), OffloadTab)
