"""What rounding does to a model's own weights, as pictures: a histogram before and after, and the loss of every block.

`job` reads and rounds (torch comes with it, in a process of its own); the drawing needs its numbers only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Step
from lowmem.plots.drawing import FAINT, GREY, Bar, Label, Line, Shape, Sheet

BINS = 120
CAPTION = "above as they are, below as one ruler for all of them reads them back; groups have rulers of their own"
BEFORE, AFTER = "#8a999b", "#1d8d94"
WIDTH, HEIGHT, MARGIN = 900, 250, 28
LARGEST_TENSOR_BYTES = 64_000_000
SHOWN = 1 << 16
"""Weights in the histogram."""


def job(ref: str, bits: int, group: int, allow_paths: bool = True) -> Generator[Step, None, dict[str, Any]]:
    """Round a layer of every block of `ref` to nearest.

    Returns:
        "layer": the layer of the histogram; "edges": [low, high]; "before", "after": shares by bin;
        "losses": relative loss by block.
    """
    import torch

    from lowmem.models.checkpoint import Checkpoint
    from lowmem.models.fetch import fetch
    from lowmem.models.source import read_spec
    from lowmem.planning.model_bytes import is_linear, linear_shape
    from lowmem.quant import get

    folder = yield from fetch(ref, None, allow_paths)
    spec, method = read_spec(str(folder)), get("rtn")
    fitting = [
        tensor
        for tensor in spec.tensors
        if is_linear(tensor) and (group <= 0 or linear_shape(spec, tensor)[1] % group == 0)
    ]
    if spec.quantization or not fitting:
        raise BadInput(
            f"{spec.name} has no layer that groups of {group} divide.", "Choose its original, or other groups."
        )
    chosen = _one_a_block(fitting)
    options, losses, shown = method.Options(bits=bits, group_size=group), [], {}
    with Checkpoint(folder) as checkpoint:
        for number, tensor in enumerate(chosen):
            yield Step(number, len(chosen), f"Rounding block {number + 1}")
            weight = checkpoint.read(tensor.name).float()
            weight = weight.t().contiguous() if spec.model_type == "gpt2" else weight
            rounded = method.quantize([weight], None, options, CancelToken())[0]
            losses.append(rounded.loss)
            if number == len(chosen) // 2:
                # One scale for all shows the grid; groups of their own would hide it among each other.
                part = weight.reshape(1, -1)[:, :SHOWN]
                edge = float(part.std() * 4) or 1.0
                read = method.quantize([part], None, method.Options(bits=bits, group_size=-1), CancelToken())[0]
                shown = {
                    "layer": tensor.name.removesuffix(".weight"),
                    "edges": [-edge, edge],
                    "before": _shares(torch.histc(part, BINS, -edge, edge)),
                    "after": _shares(torch.histc(read.dequantize(), BINS, -edge, edge)),
                }
    return {**shown, "losses": losses, "bits": bits, "group": group, "model": spec.name}


def _one_a_block(tensors: Sequence[Any]) -> list[Any]:
    """The smallest layer of each block, in the order of the blocks."""
    blocks: dict[int, Any] = {}
    for tensor in tensors:
        index = next(int(part) for part in tensor.name.split(".") if part.isdigit())
        if tensor.nbytes <= LARGEST_TENSOR_BYTES and (index not in blocks or tensor.nbytes < blocks[index].nbytes):
            blocks[index] = tensor
    return [blocks[index] for index in sorted(blocks)]


def _shares(counts: Any) -> list[float]:
    return [float(count) for count in counts / counts.max().clamp_min(1)]


def histogram(found: Mapping[str, Any]) -> Sheet:
    """The weights of one layer before and after rounding, upwards and downwards of a line."""
    title = f"{found['layer']}, {found['bits']} bits"
    return Sheet(WIDTH, HEIGHT + 56, tuple(_histogram(found, title)), title)


def _histogram(found: Mapping[str, Any], title: str) -> Iterator[Shape]:
    yield Label(MARGIN, 18, title, 15, bold=True)
    yield Label(MARGIN, 38, CAPTION, 12)
    low, high = found["edges"]
    step, middle = (WIDTH - 2 * MARGIN) / BINS, 56 + HEIGHT / 2 - 8
    room = HEIGHT / 2 - 22
    for number, (before, after) in enumerate(zip(found["before"], found["after"], strict=True)):
        x = MARGIN + number * step
        yield Bar(x, middle - room * before, step - 1.2, room * before, BEFORE)
        yield Bar(x, middle + 2, step - 1.2, room * after, AFTER)
    yield Line(MARGIN, middle + 1, WIDTH - MARGIN, middle + 1, GREY)
    for share, value in ((0.0, low), (0.5, 0.0), (1.0, high)):
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        yield Label(MARGIN + share * (WIDTH - 2 * MARGIN), HEIGHT + 44, f"{value:.3g}", 12, anchor)


def losses(values: Sequence[float], title: str, unit: str) -> Sheet:
    """The loss of every block as bars."""
    return Sheet(WIDTH, 236, tuple(_losses(values, title, unit)), title)


def _losses(values: Sequence[float], title: str, unit: str) -> Iterator[Shape]:
    yield Label(MARGIN, 18, title, 15, bold=True)
    yield Label(MARGIN, 38, unit, 12)
    top, bottom, left = 56, 200, MARGIN + 56
    largest = max(values, default=0) or 1.0
    step = (WIDTH - MARGIN - left) / max(1, len(values))
    for share in (0.5, 1.0):
        y = bottom - share * (bottom - top)
        yield Line(left, y, WIDTH - MARGIN, y, FAINT)
        yield Label(left - 8, y, f"{largest * share:.1e}", 11, "end")
    for number, value in enumerate(values):
        height = (bottom - top) * value / largest
        yield Bar(left + number * step, bottom - height, max(1.0, step - 3), height, AFTER)
    yield Line(left, bottom, WIDTH - MARGIN, bottom, GREY)
    yield Label(left, bottom + 18, "first block", 12)
    yield Label(WIDTH - MARGIN, bottom + 18, "last block", 12, "end")


def by_block(named: Mapping[str, float]) -> list[float]:
    """Mean loss of each block, from a receipt's losses by layer."""
    blocks: dict[int, list[float]] = {}
    for name, loss in named.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        blocks.setdefault(index, []).append(loss)
    return [sum(blocks[index]) / len(blocks[index]) for index in sorted(blocks)]
