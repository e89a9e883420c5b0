"""Push a result to the hub, with a token typed for that one action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Step
from lowmem.messages import msg, translate
from lowmem.ui.html import plan as render
from lowmem.ui.language import escape
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import PRIVATE, QUICK
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.service.results import push_result


class PushBox:
    """Creates its components in the current layout.

    Args:
        receipt: State with the receipt of the result, as a dict.
        key: names its elements, for pages with several.
    """

    def __init__(self, context: Context, receipt: gr.State, key: str = "push") -> None:
        self.access = context.engine.access
        with gr.Accordion(msg("Push to the hub"), open=False, visible=not self.access.public, elem_id=key) as box:
            repo = gr.Textbox(
                label=msg("Repository"), placeholder=msg("your-name/your-model"), max_length=200, elem_id=f"{key}-repo"
            )
            token = gr.Textbox(
                label=msg("Hub token with write access"),
                info=msg("Used for this upload only and never stored."),
                type="password",
                max_length=200,
                elem_id=f"{key}-token",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            )
            private = gr.Checkbox(True, label=msg("Private"), elem_id=f"{key}-private")
            style = {"variant": "secondary", "size": "sm", "min_width": 140}
            self.runner = ButtonRunner(
                context, key, msg("Push to the hub"), starting=msg("Uploading"), queue=PRIVATE, **style
            )
        outputs = [token, self.runner.progress, self.runner.notice]
        self.runner.wire([receipt, repo, token, private], outputs, self._start)
        context.when_opened(lambda: gr.Accordion(visible=self.access.owned), None, box, **QUICK)

    def _start(
        self, cancel: CancelToken, receipt: dict[str, Any] | None, repo: str, token: str, private: bool
    ) -> tuple[Iterator[Any], View]:
        folder = (receipt or {}).get("details", {}).get("folder", "")
        pushed = ""

        def events() -> Iterator[Any]:
            yield Step(0, 0, msg("Uploading"))
            yield from push_result(self.access, folder, repo, token, private, cancel)

        def view(gathered: Sequence[Any]) -> list[Any]:
            """The token leaves the page with the click and does not come back."""
            nonlocal pushed
            for address in (event for event in gathered if isinstance(event, str)):
                link = f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(address)}</a>'
                pushed = f'<p class="lm-notice" role="status">{translate(msg("Pushed to {address}", address=link))}</p>'
            return ["", render.progress(Step(0, 0, msg("Uploading"))) if gathered and not pushed else "", pushed]

        return events(), view
