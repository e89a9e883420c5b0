"""Models and results on the machine's disk, and the button that deletes one: for the page's owner."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowmem.messages import Message, msg
from lowmem.ui.html import parts
from lowmem.ui.names import name
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.models import with_automatic
from lowmem.units import format_bytes


class Storage:
    """A list with sizes; the first click asks for confirmation, the second deletes."""

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.pending = gr.State("")  # key of the entry that the next click deletes
        with gr.Accordion(msg("Stored on this machine"), open=False, elem_id="stored") as self.box:
            gr.HTML(
                parts.quiet(
                    msg(
                        "Downloaded models, results of this page, and ONNX graphs written when a model was first loaded."
                    )
                )
            )
            self.which = gr.Dropdown([], value=None, label=msg("Model or result"), elem_id="stored-which")
            with gr.Row(elem_classes="lm-actions"):
                self.button = gr.Button(
                    msg("Delete"), interactive=False, scale=0, min_width=200, elem_id="delete-stored"
                )
            self.notice = gr.HTML(elem_id="stored-notice")
        context.when_opened(lambda: gr.Accordion(visible=self.engine.access.owned), None, self.box, **QUICK)

    def wire(self, model: Any) -> None:
        """
        Args:
            model: the dropdown of models, from which deleted entries are removed.
        """
        own = [self.which, self.button, self.pending]
        self.box.expand(self._listed, None, [*own, self.notice], **QUICK)
        self.which.change(self._chosen, self.which, [self.button, self.pending], **QUICK)
        self.button.click(self._click, [self.which, self.pending], [*own, self.notice, model], **QUICK)

    def _listed(self) -> list[Any]:
        found = self.engine.stored() if self.engine.access.owned else []
        entries = [
            (
                Message(
                    "{one} · {kind} · {nbytes}",
                    one=one.name,
                    kind=name("kinds", one.kind),
                    nbytes=format_bytes(one.nbytes),
                ),
                one.key,
            )
            for one in found
        ]
        return [gr.Dropdown(entries, value=None), *self._chosen(None), ""]

    def _chosen(self, key: str | None) -> list[Any]:
        return [gr.Button(msg("Delete"), variant="secondary", interactive=bool(key)), ""]

    def _click(self, key: str | None, pending: str) -> list[Any]:
        if key and key != pending:
            sure = gr.Button(msg("Delete permanently?"), variant="stop")
            return [gr.skip(), sure, key, "", gr.skip()]
        try:
            freed = self.engine.delete(key or "")
        except Exception as error:
            return [*self._listed()[:3], notice(error), gr.skip()]
        gone = parts.quiet(msg("Freed {size}.", size=format_bytes(freed)))
        return [*self._listed()[:3], gone, gr.Dropdown(with_automatic(self.engine))]
