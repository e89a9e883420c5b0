"""The Offload tab: run what does not fit, see where its blocks live and what a token costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowmem.events import Chunk, Receipt, Step
from lowmem.offload.predict import Speed
from lowmem.planning.goal import detected_limits
from lowmem.ui import render, render_offload
from lowmem.ui.bind import HEAVY, QUICK, TEXT_LIMIT, Jobs, bounded, notice, pump
from lowmem.ui.depot import MOST_TOKENS, Ask, Depot
from lowmem.ui.sidebar import Sidebar
from lowmem.ui.strings import say
from lowmem.units import GB

KIND = "offload"
AUTO, DISK, CHOOSE = "auto", "disk", "choose"


class OffloadTab:
    """Layout and wiring of the tab."""

    def __init__(self, depot: Depot, jobs: Jobs, sidebar: Sidebar) -> None:
        self.depot, self.jobs, self.sidebar = depot, jobs, sidebar
        with gr.Row(elem_id="offload"):
            with gr.Column(scale=3, min_width=300):
                self._build_controls()
            with gr.Column(scale=2, min_width=300, elem_id="offload-side"):
                self.picture = gr.HTML(elem_id="offload-picture")
                self.problem = gr.HTML(elem_id="offload-problem")
                self.again = gr.Button(say("offload_again"), size="sm", elem_id="offload-again")
        with gr.Column(elem_id="offload-exercise"):
            with gr.Row(elem_classes="lm-actions"):
                self.exercise = gr.Button(say("offload_exercise"), scale=0, min_width=300, elem_id="offload-compare")
            gr.HTML(render.quiet(say("offload_exercise_help")))
            self.table = gr.HTML(elem_id="offload-table")
            self.plot = gr.HTML(elem_id="offload-plot")
        self._wire()

    def _build_controls(self) -> None:
        engine = self.depot.engine
        limits = detected_limits(engine.hardware())
        self.model = gr.Dropdown(
            engine.catalog(),
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
            self.disk_list = gr.Textbox(
                "", label=say("offload_disk_list"), info=say("offload_list_help"), elem_id="offload-disk-list"
            )
            self.ram_list = gr.Textbox(
                "",
                label=say("offload_ram_list"),
                info=say("offload_list_help"),
                visible=limits.vram is not None,
                elem_id="offload-ram-list",
            )
        self.prompt = gr.Textbox(
            say("offload_prompt"),
            label=say("prompt"),
            lines=2,
            max_lines=8,
            max_length=TEXT_LIMIT,
            elem_id="offload-prompt",
        )
        self.tokens = gr.Slider(1, MOST_TOKENS, value=16, step=1, label="Max new tokens", elem_id="offload-tokens")
        with gr.Row(elem_classes="lm-actions"):
            self.start = gr.Button(
                say("offload_run"), variant="primary", scale=0, min_width=180, elem_id="offload-start"
            )
            self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id="offload-stop")
        self.live = gr.HTML(elem_id="offload-live")
        self.notice = gr.HTML(elem_id="offload-notice")
        self.text = gr.Textbox(
            label=say("continuation"), lines=3, max_lines=16, interactive=False, elem_id="offload-text"
        )
        self.measured = gr.HTML(elem_id="offload-measured")

    def _wire(self) -> None:
        self.asked: list[Any] = [self.model, self.ram, self.vram, self.where, self.disk_list, self.ram_list]
        self.priced = [self.picture, self.start, self.problem]
        for control in self.asked:
            control.change(self._price, self.asked, self.priced, trigger_mode="always_last", **QUICK)
        self.where.change(lambda where: gr.Row(visible=where == CHOOSE), self.where, self.lists, **QUICK)
        self.again.click(self._measure, self.asked, self.priced, **HEAVY)
        buttons = [self.start, self.exercise, self.stop, self.live, self.notice]
        ran = self.start.click(self._begin, None, buttons, **QUICK).then(
            self._run, [self.prompt, self.tokens, *self.asked], [*buttons, self.text, self.measured], **HEAVY
        )
        self.sidebar.after(ran).then(self._price, self.asked, self.priced, **QUICK)
        compared = self.exercise.click(self._begin, None, buttons, **QUICK).then(
            self._compare, [self.prompt, self.tokens, *self.asked], [*buttons, self.table, self.plot], **HEAVY
        )
        self.sidebar.after(compared)
        self.stop.click(self._stop, None, self.live, **QUICK)

    def shown(self, event: Any) -> Any:
        """After `event`, price the controls as they stand; the first time this machine is measured for it."""
        return event.then(self._price, self.asked, self.priced, **QUICK)

    def _ask(self, values: tuple[Any, ...]) -> Ask:
        model, ram, vram, where, disk, in_ram = values
        sizes = (_size(ram, self.ram.maximum), _size(vram, self.vram.maximum))
        lists = {AUTO: ("", ""), DISK: ("all", "")}.get(where, (disk or "", in_ram or ""))
        return Ask((model or "").strip(), *sizes, *lists)

    def _price(self, *values: Any) -> list[Any]:
        return self._priced(values, again=False)

    def _measure(self, *values: Any) -> list[Any]:
        return self._priced(values, again=True)

    def _priced(self, values: tuple[Any, ...], *, again: bool) -> list[Any]:
        try:
            plan = self.depot.plan(self._ask(values))
            speed: Speed | None = self.depot.speed(plan, again)
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False)]
        over = plan.verdict == "over"
        problem = render.quiet(plan.sentence()) if over else ""
        return [render_offload.picture(plan, speed), gr.Button(interactive=not over), problem]

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        busy = self.depot.engine.busy
        note = say("waiting", busy=busy) if busy else say("starting")
        off = gr.Button(interactive=False)
        return [off, off, gr.Button(visible=True), render.progress(Step(0, 0, note)), ""]

    def _stop(self, request: gr.Request) -> str:
        self.jobs.stop(request, KIND)
        return render.progress(Step(0, 0, say("stopping")))

    def _run(self, request: gr.Request, prompt: str, tokens: float, *values: Any) -> Iterator[list[Any]]:
        text, last, trouble = "", None, ""
        receipt: Receipt | None = None
        try:
            with self.jobs.running(request, KIND) as token:
                bounded(prompt)
                for events in pump(self.depot.run(self._ask(values), prompt, int(tokens), token), token):
                    chunks = [event for event in events if isinstance(event, Chunk)]
                    steps = [event for event in events if isinstance(event, Step)]
                    receipt = next((event for event in events if isinstance(event, Receipt)), receipt)
                    text += "".join(chunk.text for chunk in chunks)
                    last = chunks[-1] if chunks else last
                    shown = render.live(last) if last else render.progress(steps[-1]) if steps else gr.skip()
                    yield [*[gr.skip()] * 3, shown, gr.skip(), text, gr.skip()]
        except Exception as error:
            trouble = notice(error)
        made = render_offload.measured(receipt) if receipt else ""
        yield [*_ready(), render.live(last), trouble, text, made]

    def _compare(self, request: gr.Request, prompt: str, tokens: float, *values: Any) -> Iterator[list[Any]]:
        rows: list[dict[str, Any]] = []
        trouble, title = "", str(values[0])
        try:
            with self.jobs.running(request, KIND) as token:
                bounded(prompt)
                for events in pump(self.depot.compare(self._ask(values), prompt, int(tokens), token), token):
                    rows += [event for event in events if isinstance(event, dict)]
                    steps = [event for event in events if isinstance(event, Step)]
                    moved = render.progress(steps[-1]) if steps else gr.skip()
                    yield [*[gr.skip()] * 3, moved, gr.skip(), render_offload.comparison(rows), gr.skip()]
        except Exception as error:
            trouble = notice(error)
        yield [*_ready(), "", trouble, render_offload.comparison(rows), render_offload.plot(rows, title)]


def _ready() -> list[Any]:
    return [gr.Button(interactive=True), gr.Button(interactive=True), gr.Button(visible=False)]


def _budget(most: int | None, label: str, elem_id: str) -> gr.Slider:
    """A slider of gigabytes up to all there is; hidden without such a memory."""
    top = max(0.4, int((most or 0) / GB * 20) / 20)
    return gr.Slider(0.3, top, value=top, step=0.05, label=label, visible=most is not None, elem_id=elem_id, buttons=[])


def _size(gigabytes: float, top: float) -> str:
    """ "" at the slider's end: all that is free."""
    return "" if gigabytes >= top else f"{gigabytes:.2f}G"
