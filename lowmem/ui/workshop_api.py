"""Named endpoints of quantizing and comparing, like those in `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.measure.options import MeasureOptions
from lowmem.measure.texts import MANUAL
from lowmem.ui.api import told_stream
from lowmem.ui.bind import ENGINE, pump
from lowmem.ui.workshop import Ask, Workshop

Json = dict[str, Any]


def add_workshop_endpoints(workshop: Workshop) -> None:
    """Add /quantize and /compare to the Blocks that is being built."""
    for stream in (_quantize(workshop), _compare(workshop)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)


def _quantize(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def quantize(
        model: str,
        method: str = "gptq",
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        calibration: str = MANUAL,
        samples: int = 64,
        sequence_length: int = 512,
        options: dict | None = None,
        ram: str = "",
    ) -> Iterator[dict]:
        """Quantize a model; yields progress, last of all {"receipt": ...} whose details name the folder."""
        main = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        text = {"text": calibration, "samples": samples, "length": sequence_length}
        ask = Ask(model.strip(), method, main | (options or {}), text, {"ram": ram})
        token = CancelToken()
        for events in pump(workshop.quantize(ask, token), token):
            for event in events:
                yield {"receipt": event.as_dict()} if isinstance(event, Receipt) else asdict(event)

    return quantize


def _compare(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def compare(
        model: str, variants: list, text: str = MANUAL, options: dict | None = None, ram: str = ""
    ) -> Iterator[dict]:
        """Measure variants such as "fp32", "int8", "gptq:4:64"; yields steps and rows, last of all the receipt."""
        token = CancelToken()
        chosen = build(MeasureOptions, options or {})
        events = workshop.compare(model.strip(), [str(v) for v in variants], text, chosen, token, {"ram": ram})
        for gathered in pump(events, token):
            for event in gathered:
                yield {"receipt": event.as_dict()} if isinstance(event, Receipt) else asdict(event)

    return compare
