"""An options dataclass as widgets, and the widgets' values as the dataclass again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import gradio as gr

from lowmem.fields import Option, build, describe
from lowmem.messages import msg
from lowmem.ui.names import name

T = TypeVar("T")

SLIDER_LIMIT = 4096  # beyond it a slider is too coarse to aim with


def widget(option: Option, prefix: str = "option") -> gr.components.Component:
    """The control that suits an option: dropdown, checkbox, slider, number or text."""
    default = option.default
    labels: dict[str, Any] = {"label": option.label, "info": option.help, "elem_id": f"{prefix}-{option.name}"}
    if option.choices:
        return gr.Dropdown(
            [(name("choices", key), key) for key in option.choices], value=default, filterable=False, **labels
        )
    if isinstance(default, bool):
        return gr.Checkbox(value=default, **labels)
    if isinstance(default, (int, float)):
        low, high, step = option.low, option.high, option.step
        if low is None or high is None or high > 1 << 20:
            return gr.Number(value=default, precision=0 if isinstance(default, int) else None, **labels)
        return gr.Slider(low, min(high, SLIDER_LIMIT), value=default, step=step, buttons=[], **labels)
    if isinstance(default, tuple):
        return gr.Textbox(value="\n".join(default), lines=2, placeholder=msg("One per line"), **labels)
    return gr.Textbox(value=default, **labels)


def widgets(kind: type, names: Iterable[str], prefix: str = "option") -> dict[str, Any]:
    """Controls for the named fields, in that order, created in the current layout."""
    known = {option.name: option for option in describe(kind)}
    return {key: widget(known[key], prefix) for key in names}


def read(kind: type[T], names: Sequence[str], values: Sequence[Any]) -> T:
    """The dataclass from the controls' values, checked.

    Raises:
        BadInput: a value outside its range, named.
    """
    known = {option.name: option for option in describe(kind)}
    read_values = {}
    for key, value in zip(names, values, strict=True):
        if isinstance(known[key].default, tuple) and isinstance(value, str):
            value = tuple(line for line in value.split("\n") if line)
        read_values[key] = value
    return build(kind, read_values)
