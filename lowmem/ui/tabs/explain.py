"""How the methods work, in words and in plots of the chosen model's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowmem.events import CancelToken
from lowmem.messages import Message, msg
from lowmem.plots import weights as pictures
from lowmem.plots.figure import to_svg
from lowmem.ui.html import parts
from lowmem.ui.names import NAMES
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.runner import ButtonRunner, View, latest

WIDTHS = (2, 3, 4, 8)
GROUP = 64


class ExplainView:
    """Creates its components in the current layout.

    Args:
        model: the dropdown with the chosen model.
        receipt: State with the last quantization's receipt as a dict, whose errors are drawn, too.
    """

    def __init__(self, context: Context, model: gr.Dropdown, receipt: gr.State) -> None:
        self.service = context.services.quantize
        with gr.Column(elem_id="explain"):
            bits = gr.Radio([(str(bits), bits) for bits in WIDTHS], value=4, label=msg("Bits"), elem_id="explain-bits")
            self.runner = ButtonRunner(
                context, "explain", msg("Plot this model's weights"), starting=msg("Reading weights")
            )
            drawn = gr.HTML(elem_id="explain-pictures")
            gr.HTML(parts.explanations(NAMES["how"]))
        self.runner.wire([model, bits, receipt], [drawn], self._start)

    def _start(
        self, token: CancelToken, model: str | None, bits: int, receipt: dict[str, Any] | None
    ) -> tuple[Iterator[Any], View]:
        events = self.service.inspect_weights((model or "").strip(), int(bits), GROUP, token)
        return events, latest(dict, lambda found: [_drawn(found, receipt)], [gr.skip()])


def _drawn(found: dict[str, Any], receipt: dict[str, Any] | None) -> str:
    unit = msg("squared error relative to squared weights; lower is better")
    title = msg(
        "{label}: {model}, round to nearest, {bits} bits, groups of {group}",
        label=msg("Error by block"),
        model=found["model"],
        bits=found["bits"],
        group=found["group"],
    )
    sheets = [pictures.histogram(found), pictures.losses(found["losses"], title, unit)]
    if receipt:
        losses = pictures.by_block(receipt["details"]["losses"])
        title = Message(
            "{label}: {model}, {precision}",
            label=msg("Error by block"),
            model=receipt["model"],
            precision=receipt["precision"],
        )
        sheets.append(pictures.losses(losses, title, unit))
    return "".join(parts.drawing(to_svg(sheet)) for sheet in sheets)
