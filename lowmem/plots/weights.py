"""What rounding does to a model's weights: a histogram before and after it, and the loss of every block.

`job` reads and rounds with torch, in a child process; the plots need only its numbers.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Step
from lowmem.messages import Message, msg
from lowmem.planning.placement import block_index
from lowmem.plots.figure import GREY, new_plot, scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 120
CAPTION = msg(
    "above: the original weights; below: rounded with one scale for all of them (groups have their own scales)"
)
BEFORE, AFTER = "#8a999b", "#1d8d94"
WIDTH, HEIGHT = 900, 280
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
    from lowmem.quant import get

    folder = yield from fetch(ref, None, allow_paths)
    spec, method = read_spec(str(folder)), get("rtn")
    fitting = [
        tensor for tensor in spec.tensors if tensor.role == "linear" and (group <= 0 or tensor.matrices[2] % group == 0)
    ]
    if spec.quantization or not fitting:
        raise BadInput(
            msg("No layer of {model} can be divided into groups of {group}.", model=spec.name, group=group),
            msg("Choose the original model, or another group size."),
        )
    chosen = _one_a_block(fitting)
    options, losses, histogram = method.Options(bits=bits, group_size=group), [], {}
    with Checkpoint(folder) as checkpoint:
        for number, tensor in enumerate(chosen):
            yield Step(number, len(chosen), msg("Rounding block {number}", number=number + 1))
            weight = checkpoint.read(tensor.name).float()
            weight = weight.t().contiguous() if tensor.transposed else weight
            rounded = method.quantize([weight], None, options, CancelToken())[0]
            losses.append(rounded.loss)
            if number == len(chosen) // 2:
                # One scale for all shows the grid; groups of their own would hide it among each other.
                part = weight.reshape(1, -1)[:, :SHOWN]
                edge = float(part.std() * 4) or 1.0
                read = method.quantize([part], None, method.Options(bits=bits, group_size=-1), CancelToken())[0]
                histogram = {
                    "layer": tensor.name.removesuffix(".weight"),
                    "edges": [-edge, edge],
                    "before": _shares(torch.histc(part, BINS, -edge, edge)),
                    "after": _shares(torch.histc(read.dequantize(), BINS, -edge, edge)),
                }
    return {**histogram, "losses": losses, "bits": bits, "group": group, "model": spec.name}


def _one_a_block(tensors: Sequence[Any]) -> list[Any]:
    """The smallest layer of each block, in the order of the blocks."""
    blocks: dict[int, Any] = {}
    for tensor in tensors:
        index = block_index(tensor.name) or 0
        if tensor.nbytes <= LARGEST_TENSOR_BYTES and (index not in blocks or tensor.nbytes < blocks[index].nbytes):
            blocks[index] = tensor
    return [blocks[index] for index in sorted(blocks)]


def _shares(counts: Any) -> list[float]:
    return [float(count) for count in counts / counts.max().clamp_min(1)]


def histogram(found: Mapping[str, Any]) -> Figure:
    """The weights of one layer before rounding, upwards, and after it, downwards."""
    title = msg("{layer}, {bits} bits", layer=found["layer"], bits=found["bits"])
    figure, axes = new_plot(WIDTH, HEIGHT, title, CAPTION)
    low, high = found["edges"]
    step = (high - low) / BINS
    places = [low + step * (number + 0.5) for number in range(BINS)]
    axes.bar(places, found["before"], 0.8 * step, color=BEFORE)
    axes.bar(places, [-share for share in found["after"]], 0.8 * step, color=AFTER)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlim=(low, high), yticks=[])
    axes.set_xticks([low, 0, high], [Message("{value:.3g}", value=value) for value in (low, 0.0, high)])
    axes.spines["bottom"].set_visible(False)
    return figure


def losses(values: Sequence[float], title: str, unit: str) -> Figure:
    """The loss of every block as bars."""
    figure, axes = new_plot(WIDTH, HEIGHT, title, unit)
    scales(
        axes, lambda block: Message("{block:.0f}", block=block), "block", lambda loss: Message("{loss:.1e}", loss=loss)
    )
    axes.bar(range(1, len(values) + 1), values, 0.8, color=AFTER)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", integer=True)
    return figure


def by_block(named: Mapping[str, float]) -> list[float]:
    """Mean loss of each block, from a receipt's losses by layer."""
    blocks: dict[int, list[float]] = {}
    for name, loss in named.items():
        blocks.setdefault(block_index(name) or 0, []).append(loss)
    return [sum(blocks[index]) / len(blocks[index]) for index in sorted(blocks)]
