"""Dropdowns of models, and their choices."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowmem.messages import msg
from lowmem.settings import settings
from lowmem.ui.service.engine import AUTO, Engine

Choices = list[tuple[str, str]]
"""(label, reference)."""


def originals(engine: Engine) -> Choices:
    """Models that can be quantized or exported: all but the results of this page."""
    outputs = str(settings().outputs)
    return [(label, ref) for label, ref in engine.catalog() if not ref.startswith(outputs)]


def with_automatic(engine: Engine, model: str = AUTO, label: str = "") -> Choices:
    """The automatic choice, all models, and `model` if it is not among them."""
    choices = [(msg("Automatic"), AUTO), *engine.catalog()]
    return choices if model in [ref for _, ref in choices] else [*choices, (label or model, model)]


def model_dropdown(
    choices: Choices,
    elem_id: str,
    value: str = "demo",
    info: str = msg("Choose one, or enter a hub id, a folder or a .gguf file."),
    **style: Any,
) -> gr.Dropdown:
    """A dropdown that also takes a reference that is typed in."""
    return gr.Dropdown(
        choices, value=value, allow_custom_value=True, label=msg("Model"), info=info, elem_id=elem_id, **style
    )
