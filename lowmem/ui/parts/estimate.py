"""The estimate of what a form describes, shown while its controls change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice

Estimated = Callable[..., tuple[str, bool, str]]
"""(*values of the controls) -> the estimate as HTML, whether it is over the budget, and a problem to show below."""


class EstimateView:
    """Shows the estimate for the values of `controls`, and disables the button that starts what does not fit.

    Args:
        outputs: where the estimate is shown, the button, and where a problem is shown.
        measure: measures what the estimate lacks of this machine, which takes some seconds; None where nothing is measured.

    Attributes:
        changes: one event for each control, to chain on.
    """

    def __init__(
        self,
        context: Context,
        controls: list[Any],
        outputs: tuple[gr.HTML, gr.Button, gr.HTML],
        estimate: Estimated,
        measure: Callable[..., None] | None = None,
    ) -> None:
        self.controls, self.outputs, self._estimate = controls, list(outputs), estimate
        self.changes = [
            control.change(self.update, controls, self.outputs, trigger_mode="always_last", **QUICK)
            for control in controls
        ]
        context.when_opened(self.update, controls, self.outputs, **QUICK)
        if measure:
            opened = [context.tab.select(self.update, controls, self.outputs, **QUICK)] if context.tab else []
            for event in (*self.changes, *opened):
                self.after(event.then(measure, controls, None, **QUICK))

    def after(self, event: Any) -> Any:
        """Update after `event`; returns the last event, to chain on."""
        return event.then(self.update, self.controls, self.outputs, **QUICK)

    def update(self, *values: Any) -> list[Any]:
        """What the outputs become."""
        return updates(self._estimate, values)


def updates(estimate: Estimated, values: tuple[Any, ...]) -> list[Any]:
    """Estimate, button and problem for `values`; an exception is the problem."""
    try:
        shown, over, problem = estimate(*values)
    except Exception as error:
        return ["", gr.Button(interactive=False), notice(error, toast=False)]
    return [shown, gr.Button(interactive=not over), problem]
