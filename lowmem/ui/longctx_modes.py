"""What can be done with a long text: one class a mode, each built where it stands and wired once the options exist."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Receipt
from lowmem.fields import build
from lowmem.longctx import actions
from lowmem.longctx.actions import Span
from lowmem.longctx.exercise import Point, exercise
from lowmem.longctx.limits import check_stride
from lowmem.longctx.options import ExerciseOptions
from lowmem.longctx.plots import perplexity_sheet, picture, to_csv
from lowmem.measure.drawing import to_png, to_svg
from lowmem.measure.rows import write_atomically
from lowmem.measure.texts import MANUAL
from lowmem.settings import settings
from lowmem.ui import render, render_longctx, render_quantize
from lowmem.ui.bind import Jobs
from lowmem.ui.chat import conversation
from lowmem.ui.engine import Engine
from lowmem.ui.fields import widgets
from lowmem.ui.runner import Runner, View
from lowmem.ui.sidebar import Sidebar
from lowmem.ui.strings import say

if TYPE_CHECKING:
    from lowmem.ui.longctx import LongContextTab

SHOWN_CHARACTERS = 6_000
"""Of a text without end the page shows this much of the end; the rest is in a file."""

FILLER = "manual"


class ContinueMode:
    """Continue the text, without end, until Stop."""

    key = "continue"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        self.runner = Runner(engine, jobs, "long-continue", say("long_continue_start"))
        self.live = gr.HTML(elem_id="long-live")
        self.output = gr.Textbox(
            label=say("continuation"),
            lines=10,
            max_lines=16,
            interactive=False,
            buttons=["copy"],
            elem_id="long-output",
        )
        self.link = gr.HTML(elem_id="long-link")

    def wire(self, tab: LongContextTab, sidebar: Sidebar) -> None:
        self.tab = tab
        self.runner.wire(sidebar, [*tab.source, *tab.options], [self.live, self.output, self.link], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, *values: Any
    ) -> tuple[Iterator[Any], View]:
        options = self.tab.read(*values)
        self.engine.require_model()
        path = new_folder("stream") / "continuation.txt"
        shown, last = "", None

        def events() -> Iterator[Any]:
            prompt = self.tab.given(text, file, address, token)
            with path.open("w", encoding="utf-8") as full:
                for event in self.engine.generate(prompt, options, token, raw=True):
                    if isinstance(event, Chunk):
                        full.write(event.text)
                    yield event

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal shown, last
            chunks = [event for event in gathered if isinstance(event, Chunk)]
            last = chunks[-1] if chunks else last
            shown = (shown + "".join(chunk.text for chunk in chunks))[-SHOWN_CHARACTERS:]
            return [render.live(last), shown, gr.skip() if gathered else render_longctx.link(path, say("long_whole"))]

        return events(), view


class ChatMode:
    """A conversation about the text, which stands in front of it."""

    key = "chat"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        self.history = gr.Chatbot(
            show_label=False, label=say("chat"), height=340, buttons=["copy"], elem_id="long-chat", allow_tags=False
        )
        self.live = gr.HTML(elem_id="long-chat-live")
        self.message = gr.Textbox(
            label=say("message"),
            placeholder=say("long_ask_hint"),
            show_label=False,
            max_length=10_000,
            elem_id="long-message",
        )
        self.runner = Runner(engine, jobs, "long-chat-run", say("send"))

    def wire(self, tab: LongContextTab, sidebar: Sidebar) -> None:
        self.tab = tab
        inputs = [*tab.source, self.history, self.message, *tab.options]
        self.runner.wire(sidebar, inputs, [self.history, self.message, self.live], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, history: list[Any], message: str, *values: Any
    ) -> tuple[Iterator[Any], View]:
        if not message.strip():
            raise BadInput(say("empty"), say("empty_hint"))
        options = replace(self.tab.read(*values), endless=False, max_new_tokens=1024)
        self.engine.require_model()
        asked = [*history, {"role": "user", "content": message}]
        answer, last = "", None

        def events() -> Iterator[Any]:
            whole = self.tab.given(text, file, address, token)
            first = {"role": "user", "content": say("long_about", text=whole)}
            told = {"role": "assistant", "content": say("long_read_it")}
            yield from self.engine.chat([first, told, *conversation(asked)], options, token)

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal answer, last
            chunks = [event for event in gathered if isinstance(event, Chunk)]
            answer += "".join(chunk.text for chunk in chunks)
            last = chunks[-1] if chunks else last
            if not answer and not gathered:
                return [history, message, render.live(None)]
            return [[*asked, {"role": "assistant", "content": answer}], "", render.live(last)]

        return events(), view


class PerplexityMode:
    """Perplexity along the text: by windows over it, or through the cache."""

    key = "perplexity"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        self.way = gr.Radio(
            [(say("long_by_cache"), "cache"), (say("long_by_windows"), "windows")],
            value="cache",
            label=say("long_way"),
            elem_id="long-way",
        )
        self.runner = Runner(engine, jobs, "long-perplexity", say("long_perplexity_start"))
        self.result = gr.HTML(elem_id="long-perplexity-result")
        self.plot = gr.HTML(elem_id="long-perplexity-plot")

    def wire(self, tab: LongContextTab, sidebar: Sidebar) -> None:
        self.tab = tab
        inputs = [*tab.source, self.way, tab.stride, *tab.options]
        self.runner.wire(sidebar, inputs, [self.result, self.plot], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, way: str, stride: float, *values: Any
    ) -> tuple[Iterator[Any], View]:
        options = self.tab.read(*values)
        self.engine.require_model()
        if way == "windows":
            check_stride(options.window, int(stride))
        spans: list[Span] = []
        result = ""

        def events() -> Iterator[Any]:
            whole, session = self.tab.given(text, file, address, token), self.engine.session
            if way == "windows":
                yield from actions.sliding_perplexity(session, whole, options.window, int(stride), cancel=token)
            else:
                yield from actions.reading_perplexity(session, whole, options, cancel=token)

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            spans.extend(event for event in gathered if isinstance(event, Span))
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.perplexity(receipt)
            if not spans:
                return [result, ""]
            places = [((span.start + span.end) / 2, span.perplexity) for span in spans]
            return [result, render_quantize.drawing(to_svg(perplexity_sheet(places)))]

        return events(), view


class HiddenMode:
    """Hidden states into a file."""

    key = "hidden"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        with gr.Row():
            self.layers = gr.Textbox(
                "-1", label=say("long_layers"), info=say("long_layers_help"), elem_id="long-layers"
            )
            self.format = gr.Dropdown(
                ["npy", "safetensors"], value="npy", label=say("long_format"), filterable=False, elem_id="long-format"
            )
        self.runner = Runner(engine, jobs, "long-hidden", say("long_hidden_start"))
        self.result = gr.HTML(elem_id="long-hidden-result")

    def wire(self, tab: LongContextTab, sidebar: Sidebar) -> None:
        self.tab = tab
        inputs = [*tab.source, self.layers, self.format, tab.stride, tab.window]
        self.runner.wire(sidebar, inputs, [self.result], self._start)

    def _start(
        self,
        token: CancelToken,
        text: str,
        file: str,
        address: str,
        layers: str,
        kind: str,
        stride: float,
        window: float,
    ) -> tuple[Iterator[Any], View]:
        self.engine.require_model()
        check_stride(int(window), int(stride))
        chosen = layer_list(layers)
        path = new_folder("hidden") / f"hidden_states.{kind}"
        result = ""

        def events() -> Iterator[Any]:
            whole = self.tab.given(text, file, address, token)
            yield from actions.hidden_states(
                self.engine.session, whole, int(window), int(stride), path, layers=chosen, cancel=token
            )

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.hidden(receipt, path)
            return [result]

        return events(), view


class RecallMode:
    """A fact is told, text follows, the fact is asked for."""

    key = "recall"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        gr.HTML(render.quiet(say("long_recall_help")))
        self.runner = Runner(engine, jobs, "long-recall", say("long_recall_start"))
        self.result = gr.HTML(elem_id="long-recall-result")

    def wire(self, tab: LongContextTab, sidebar: Sidebar) -> None:
        self.tab = tab
        self.runner.wire(sidebar, tab.options, [self.result], self._start)

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        from lowmem.measure.texts import tail

        options = self.tab.read(*values)
        self.engine.require_model()
        result = ""

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.recalls(receipt)
            return [result]

        return actions.recall(self.engine.session, tail(FILLER).text, options, cancel=token), view


class ExerciseMode:
    """The course's second exercise: five ways to read on, side by side, each in a process of its own."""

    key = "exercise"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        gr.HTML(render.quiet(say("long_exercise_help")))
        self.controls = widgets(ExerciseOptions, ("tokens", "window", "points"), "exercise")
        self.runner = Runner(engine, jobs, "long-exercise", say("long_exercise_start"))
        self.table = gr.HTML(elem_id="long-exercise-table")
        self.plots = gr.HTML(elem_id="long-exercise-plots")
        self.files = gr.HTML(elem_id="long-exercise-files")

    def wire(self, _tab: LongContextTab, sidebar: Sidebar) -> None:
        self.sidebar = sidebar
        inputs = [*self.controls.values(), *sidebar.limits]
        self.runner.wire(sidebar, inputs, [self.table, self.plots, self.files], self._start)

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        options = build(ExerciseOptions, dict(zip(self.controls, values, strict=False)))
        plan = self.engine.resident
        ref, precision = (plan.spec.ref, plan.precision) if plan else ("demo", "auto")
        budgets = self.engine.budget_bytes(self.sidebar.budgets(tuple(values[len(self.controls) :])))
        points: list[Point] = []
        events = exercise(ref, MANUAL, options, precision=precision, cancel=token, **budgets)

        def view(gathered: Sequence[Any]) -> list[Any]:
            points.extend(event for event in gathered if isinstance(event, Point))
            if not points:
                return ["", "", ""]
            drawn = picture(points, ref)
            files = gr.skip() if gathered else _written(points, ref)
            return [render_longctx.points(points), render_quantize.drawing(to_svg(drawn)), files]

        return events, view


def _written(points: Sequence[Point], ref: str) -> str:
    folder = new_folder("exercise")
    table = write_atomically(folder / "exercise.csv", to_csv(points))
    drawn = write_atomically(folder / "exercise.png", to_png(picture(points, ref)))
    return render_longctx.link(table, say("csv")) + render_longctx.link(drawn, say("png"))


def layer_list(text: str) -> list[int]:
    """
    Raises:
        BadInput: not numbers with commas between.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{text[:40]!r} is not a list of layers.", "Write it like 0,6,-1.") from None


def new_folder(kind: str) -> Path:
    """A new folder for what an action writes, below `settings().outputs`."""
    folder = settings().outputs / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
