"""Verify the resident set-up: a button, and the claims as they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.messages import msg
from lowmem.ui.html import parts
from lowmem.ui.html.verify import verified
from lowmem.ui.language import Html
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.verify.claims import Claim


class VerifyBox:
    """Creates its components in the current layout."""

    def __init__(self, context: Context) -> None:
        self.service = context.services.verify
        with gr.Accordion(msg("Verify this set-up"), open=False, elem_id="verify"):
            gr.HTML(
                Html(
                    lambda: parts.quiet(
                        msg(
                            "Measures on this machine what was predicted: memory, speed, closeness to the original, recall. Takes a minute or more."
                        )
                    )
                )
            )
            self.original = gr.Textbox(
                label=msg("Original model"),
                info=msg("Only for a quantized checkpoint: what it was made from."),
                max_length=400,
                elem_id="verify-original",
            )
            self.runner = ButtonRunner(
                context, "verify", msg("Verify"), starting=msg("Verifying"), variant="secondary", size="sm"
            )
            self.result = gr.HTML(elem_id="verify-result")
        self.runner.wire([self.original], [self.result], self._start)

    def _start(self, token: CancelToken, original: str) -> tuple[Iterator[Any], View]:
        claims: list[Claim] = []
        receipt: Receipt | None = None

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal receipt
            claims.extend(event for event in gathered if isinstance(event, Claim))
            receipt = next((event for event in gathered if isinstance(event, Receipt)), receipt)
            return [verified(claims, receipt)]

        return self.service.verify(token, (original or "").strip()), view
