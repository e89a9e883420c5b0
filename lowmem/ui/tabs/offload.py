"""The Offload tab: run what does not fit, see where its blocks live and what a token costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.machine.budget import MemoryBudget
from lowmem.offload.estimate import SpeedEstimate
from lowmem.planning.plan import Plan
from lowmem.ui.html import offload as render_offload
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import QUICK, TEXT_LIMIT, Jobs, bounded, notice
from lowmem.ui.parts.runner import Runner, View
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.offloading import MOST_ANSWERS, MOST_TOKENS, Ask, Depot
from lowmem.ui.tabs.completion import joined
from lowmem.units import GB

AUTO, DISK, CHOOSE = "auto", "disk", "choose"
SMALLEST_GB = 0.3


class OffloadTab:
    """Layout and wiring of the tab."""

    def __init__(self, depot: Depot, jobs: Jobs, sidebar: Sidebar) -> None:
        self.depot = depot
        with gr.Row(elem_id="offload"):
            with gr.Column(scale=3, min_width=300):
                self._build_controls()
                self.single = Runner(depot.engine, jobs, "offload", say("offload_run"))
                self.live = gr.HTML(elem_id="offload-live")
                self.text = gr.Textbox(
                    label=say("continuation"), lines=3, max_lines=16, interactive=False, elem_id="offload-text"
                )
                self.measured = gr.HTML(elem_id="offload-measured")
            with gr.Column(scale=2, min_width=300, elem_id="offload-side"):
                self.problem = gr.HTML(elem_id="offload-problem")
                self.picture = gr.HTML(elem_id="offload-picture")
                self.again = gr.Button(say("offload_again"), size="sm", elem_id="offload-again")
        with gr.Column(elem_id="offload-exercise"):
            gr.HTML(render_offload.section(say("offload_exercise_title"), say("offload_exercise_help")))
            self.exercise = Runner(depot.engine, jobs, "offload-compare", say("offload_exercise"))
            self.table = gr.HTML(elem_id="offload-table")
            self.plot = gr.HTML(elem_id="offload-plot")
        self._wire(sidebar)

    def _build_controls(self) -> None:
        limits = MemoryBudget.detect(self.depot.engine.hardware())
        self.model = gr.Dropdown(
            self.depot.engine.catalog(),
            value="demo",
            allow_custom_value=True,
            label=say("model"),
            info=say("offload_model"),
            elem_id="offload-model",
        )
        with gr.Row():
            self.vram = _budget(limits.vram, say("offload_vram"), "offload-vram")
            self.ram = _budget(limits.ram, say("offload_ram"), "offload-ram")
        self.where = gr.Radio(
            [(say("offload_auto"), AUTO), (say("offload_disk"), DISK), (say("offload_choose"), CHOOSE)],
            value=AUTO,
            label=say("offload_where"),
            elem_id="offload-where",
        )
        with gr.Row(visible=False) as self.lists:
            self.disk_list = _list(say("offload_disk_list"), "offload-disk-list")
            self.ram_list = _list(say("offload_ram_list"), "offload-ram-list", visible=limits.vram is not None)
        self.prompt = gr.Textbox(
            say("offload_prompt"),
            label=say("prompt"),
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
                label=say("offload_tokens"),
                info=say("offload_tokens_help"),
                elem_id="offload-tokens",
                min_width=220,
                buttons=[],
            )
            self.answers = gr.Slider(
                0,
                MOST_ANSWERS,
                value=1,
                step=1,
                label=say("offload_answers"),
                info=say("offload_answers_help"),
                elem_id="offload-answers",
                min_width=220,
                buttons=[],
            )

    def _wire(self, sidebar: Sidebar) -> None:
        self.asked: list[Any] = [
            self.model, self.ram, self.vram, self.where, self.disk_list, self.ram_list, self.answers,
        ]  # fmt: skip
        self.priced = [self.picture, self.single.run, self.problem]
        for control in self.asked:
            self._price_after(control.change(self._price, self.asked, self.priced, trigger_mode="always_last", **QUICK))
        self.where.change(lambda where: gr.Row(visible=where == CHOOSE), self.where, self.lists, **QUICK)
        self.again.click(
            lambda: gr.Button(say("offload_measuring"), interactive=False), None, self.again, **QUICK
        ).then(self._measure_again, self.asked, [*self.priced, self.again], **QUICK)
        inputs = [self.prompt, self.tokens, *self.asked]
        ran = self.single.wire(sidebar, inputs, [self.live, self.text, self.measured], self._run)
        self._price_after(ran.then(self._price, self.asked, self.priced, **QUICK))
        self.exercise.wire(sidebar, inputs, [self.table, self.plot], self._compare)

    def shown(self, event: Any) -> Any:
        """After `event`, price the controls as they stand."""
        return event.then(self._price, self.asked, self.priced, **QUICK)

    def opened(self, tab: gr.Tab) -> None:
        """When somebody comes to the tab, this machine is measured unless it was."""
        self._price_after(tab.select(self._price, self.asked, self.priced, **QUICK))

    def _price_after(self, event: Any) -> None:
        event.then(self._measure, self.asked, self.picture, **QUICK)

    def _ask(self, values: Sequence[Any]) -> Ask:
        model, ram, vram, where, disk, in_ram, answers = values
        disk, in_ram = {AUTO: ("", ""), DISK: ("all", "")}.get(where, (disk or "", in_ram or ""))
        return Ask(
            model=(model or "").strip(),
            budget=MemoryBudget(_limit(ram, self.ram.maximum), _limit(vram, self.vram.maximum)),
            disk_blocks=disk,
            ram_blocks=in_ram,
            answers=int(answers),
        )

    def _price(self, *values: Any) -> list[Any]:
        try:
            plan = self.depot.plan(self._ask(values))
            speed = self.depot.speed(plan)
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False)]
        over = plan.verdict == "over"
        problem = render.quiet(plan.sentence()) if over else ""
        return [self._picture(plan, speed), gr.Button(interactive=not over), problem]

    def _picture(self, plan: Plan, speed: SpeedEstimate | None) -> str:
        return render_offload.picture(plan, speed, here=self.depot.here(plan))

    def _measure(self, *values: Any) -> Any:
        """The picture with a prediction, where there was none."""
        try:
            plan = self.depot.plan(self._ask(values))
            if self.depot.speed(plan) is None and (speed := self.depot.measure(plan)):
                return self._picture(plan, speed)
        except Exception:
            pass  # `_price` has said what is wrong
        return gr.skip()

    def _measure_again(self, *values: Any) -> list[Any]:
        ready = gr.Button(say("offload_again"), interactive=True)
        try:
            self.depot.measure(self.depot.plan(self._ask(values)), again=True)
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False), ready]
        return [*self._price(*values), ready]

    def _run(self, token: CancelToken, prompt: str, tokens: float, *values: Any) -> tuple[Iterator[Any], View]:
        bounded(prompt)
        answers: dict[int, str] = {}
        told: dict[str, Any] = {}

        def view(events: Sequence[Any]) -> list[Any]:
            for event in events:
                if isinstance(event, Chunk):
                    answers[event.index] = answers.get(event.index, "") + event.text
                    told["live"] = render.live(event)
                elif isinstance(event, Completion):
                    answers[event.index] = event.text
                elif isinstance(event, Receipt):
                    told["receipt"] = render_offload.measured(event)
            return [told.get("live", ""), joined(answers), told.get("receipt", "")]

        return _counted(self.depot.run(self._ask(values), prompt, int(tokens), token), int(tokens)), view

    def _compare(self, token: CancelToken, prompt: str, tokens: float, *values: Any) -> tuple[Iterator[Any], View]:
        bounded(prompt)
        rows: list[dict[str, Any]] = []
        title = str(values[0])

        def view(events: Sequence[Any]) -> list[Any]:
            rows.extend(event for event in events if isinstance(event, dict))
            return [render_offload.comparison(rows), render_offload.plot(rows, title)]

        return self.depot.compare(self._ask(values), prompt, int(tokens), token), view


def _counted(events: Iterator[Any], tokens: int) -> Iterator[Any]:
    """Tokens as progress, too: each may take seconds."""
    for event in events:
        if isinstance(event, Chunk):
            yield Step(event.new_tokens, tokens, say("offload_writing"), "tokens")
        yield event


def _budget(most: int | None, label: str, elem_id: str) -> gr.Slider:
    """A slider of gigabytes up to all there is; hidden without such a memory."""
    top = max(SMALLEST_GB + 0.1, int((most or 0) / GB * 20) / 20)
    return gr.Slider(
        SMALLEST_GB, top, value=top, step=0.05, label=label, visible=most is not None, elem_id=elem_id, buttons=[]
    )


def _list(label: str, elem_id: str, *, visible: bool = True) -> gr.Textbox:
    return gr.Textbox("", label=label, info=say("offload_list_help"), visible=visible, elem_id=elem_id)


def _limit(gigabytes: float, top: float) -> int | None:
    """None at the slider's end: all that is free."""
    return None if gigabytes >= top else round(gigabytes * GB)
