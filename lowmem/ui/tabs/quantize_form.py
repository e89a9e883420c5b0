"""The controls of a quantization: model, method and its options, calibration text; and the request that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from lowmem import quant
from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.fields import build, describe
from lowmem.messages import msg
from lowmem.quant import get
from lowmem.quant.base import BITS
from lowmem.quant.calibration import Calibration
from lowmem.quant.request import EMBEDDING_BITS, QuantizeRequest
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html
from lowmem.ui.names import name
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.fields import widgets
from lowmem.ui.parts.models import model_dropdown, originals

GROUPS = (32, 64, 128, -1)
OWN_FILE = "file"
_MAIN = ("bits", "group_size", "symmetric")


class QuantizeForm:
    """Creates its components in the current layout.

    Attributes:
        controls: all of them, in the order in which `request` takes their values.
    """

    def __init__(self, context: Context) -> None:
        self.service, self.sidebar = context.services.quantize, context.sidebar
        refused = self.service.methods()
        usable = [method for method in quant.METHODS if refused[method] is None]
        first = quant.DEFAULT if quant.DEFAULT in usable else usable[0]
        with gr.Row():
            self.model = model_dropdown(originals(context.engine), "quant-model")
        self.method = gr.Radio(
            [(get(method).label, method) for method in usable],
            value=first,
            label=msg("Method"),
            info=get(first).description,
            elem_id="quant-method",
        )
        gr.HTML(
            Html(
                lambda: render.refusals(
                    [(get(m).label, why) for m, why in refused.items() if why], msg("Not on this machine")
                )
            )
        )
        with gr.Row():
            self.bits = gr.Radio(
                _bits(first), value=_preset(first, "bits"), label=msg("Bits"), elem_id="quant-bits", min_width=230
            )
            self.group = gr.Dropdown(
                _groups(first),
                value=_preset(first, "group_size"),
                label=msg("Group size"),
                info=msg("Weights that share a scale. Smaller groups are more precise and take more space."),
                filterable=False,
                elem_id="quant-group",
                min_width=200,
            )
        self.symmetric = gr.Checkbox(
            _preset(first, "symmetric"),
            label=msg("Symmetric"),
            info=msg("Without zero points: slightly less precise, supported by more programs."),
            elem_id="quant-symmetric",
        )
        self.embedding = gr.Radio(
            [(msg("{bits}, as they are", bits=bits) if bits == 16 else str(bits), bits) for bits in EMBEDDING_BITS],
            value=EMBEDDING_BITS[0],
            label=msg("Bits of embedding and output head"),
            info=msg("With 16 other programs can read the result; fewer bits are read by lowmem alone."),
            elem_id="quant-embedding",
        )
        self._build_calibration(visible=get(first).calibrated)
        self._build_advanced(first)
        self.restart = gr.Checkbox(
            False,
            label=msg("Start over"),
            info=msg("Delete an unfinished run of this model with other settings."),
            elem_id="quant-restart",
        )
        self.controls: list[Any] = [
            self.model,
            self.method,
            self.bits,
            self.group,
            self.symmetric,
            self.text,
            self.file,
            self.samples,
            self.length,
            self.restart,
            self.embedding,
            *self.advanced.values(),
            *self.sidebar.limits,
        ]

    def _build_calibration(self, visible: bool) -> None:
        usual = Calibration()
        with gr.Column(visible=visible, elem_id="quant-calibration") as self.calibration:
            with gr.Row():
                self.text = gr.Dropdown(
                    [(name("texts", key), key) for key in (*texts.NAMES, OWN_FILE)],
                    value=texts.MANUAL,
                    label=msg("Calibration text"),
                    info=msg("Text that the method runs through the model to choose the rounding."),
                    filterable=False,
                    elem_id="quant-text",
                    min_width=240,
                )
                self.samples = gr.Slider(
                    4, 512, value=usual.samples, step=4, label=msg("Samples"), buttons=[], min_width=180,
                    elem_id="quant-samples",
                )  # fmt: skip
                self.length = gr.Slider(
                    64, 4096, value=usual.length, step=64, label=msg("Tokens per sample"), buttons=[],
                    min_width=180, elem_id="quant-length",
                )  # fmt: skip
            self.file = gr.File(
                label=msg("Text file (UTF-8, up to 2 MB)"),
                file_types=["text"],
                height=110,
                visible=False,
                elem_id="quant-file",
            )
            self.overlap = gr.HTML(elem_id="quant-overlap")

    def _build_advanced(self, first: str) -> None:
        self.advanced: dict[tuple[str, str], Any] = {}
        self.folds: dict[str, Any] = {}
        with gr.Accordion(msg("Advanced"), open=False, elem_id="quant-advanced", visible=bool(_extra(first))) as fold:
            for method in quant.METHODS:
                with gr.Column(visible=method == first) as column:
                    made = widgets(get(method).Options, _extra(method), f"quant-{method}")
                self.advanced |= {(method, key): control for key, control in made.items()}
                self.folds[method] = column
        self.fold = fold

    def wire(self) -> None:
        """What controls do to each other."""
        self.method.input(
            self._fit_method,
            self.method,
            [self.method, self.bits, self.group, self.symmetric, self.calibration, self.fold, *self.folds.values()],
            **QUICK,
        )
        self.text.input(lambda text: gr.File(visible=text == OWN_FILE), self.text, self.file, **QUICK)
        for control in (self.text, self.file):
            control.change(self._overlap, [self.text, self.file], self.overlap, **QUICK)

    def _fit_method(self, method: str) -> list[Any]:
        symmetric = [value for value in (False, True) if _possible(method, symmetric=value)]
        return [
            gr.Radio(info=get(method).description),
            gr.Radio(_bits(method), value=_preset(method, "bits")),
            gr.Dropdown(_groups(method), value=_preset(method, "group_size")),
            gr.Checkbox(_preset(method, "symmetric"), interactive=len(symmetric) > 1),
            gr.Column(visible=get(method).calibrated),
            gr.Accordion(visible=bool(_extra(method))),
            *(gr.Column(visible=other == method) for other in self.folds),
        ]

    def _overlap(self, text: str, file: str | None) -> str:
        if text != OWN_FILE or not file:
            return ""
        try:
            warning = self.service.overlap(file)
        except Exception as error:
            return notice(error, toast=False)
        return parts.quiet(warning) if warning else ""

    def request(self, values: Sequence[Any]) -> QuantizeRequest:
        """The request that the controls describe.

        Raises:
            BadInput, Unsupported: a value out of range, or a method that does not run here; a missing file.
        """
        model, method, bits, group, symmetric, text, file, samples, length, restart, embedding, *rest = values
        advanced, limits = rest[: len(self.advanced)], rest[len(self.advanced) :]
        own = {key: value for (owner, key), value in zip(self.advanced, advanced, strict=True) if owner == method}
        if text == OWN_FILE and not file and get(method).calibrated:
            raise BadInput(msg("No calibration file was uploaded."), msg("Upload a text file, or choose another text."))
        source = file if text == OWN_FILE and file else texts.MANUAL if text == OWN_FILE else text
        return self.service.request(
            model=(model or "").strip(),
            method=method,
            options={"bits": bits, "group_size": group, "symmetric": symmetric} | own,
            calibration={"text": source, "samples": samples, "length": length},
            budget=self.sidebar.budget_of(limits),
            restart=bool(restart),
            embedding_bits=embedding,
        )


def _extra(method: str) -> list[str]:
    return [option.name for option in describe(get(method).Options) if option.name not in _MAIN]


def _preset(method: str, key: str) -> Any:
    return next(option.default for option in describe(get(method).Options) if option.name == key)


def _possible(method: str, **options: Any) -> bool:
    try:
        build(get(method).Options, options).check()
    except BadInput:
        return False
    return True


def _bits(method: str) -> list[tuple[str, int]]:
    return [
        (msg("2 (experimental)") if bits == 2 else str(bits), bits) for bits in BITS if _possible(method, bits=bits)
    ]


def _groups(method: str) -> list[tuple[str, int]]:
    fitting = [size for size in GROUPS if _possible(method, group_size=size)]
    return [(msg("A whole row") if size == -1 else str(size), size) for size in fitting]
