"""Split a graph into segments of consecutive blocks, for an engine builder that cannot hold the whole graph.

Works on graphs of PyTorch's exporter, whose nodes name the modules they come from. All segments share the weight file.
Segments can run on a CPU, so they can be verified without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lowmem.errors import OutOfMemory, Unsupported
from lowmem.messages import msg
from lowmem.units import MB

_BLOCK = re.compile(r"\.(\d+)(?=[.'\"]|$)")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks `first` to `last` (exclusive); the first segment takes token ids, the last returns logits."""

    first: int
    last: int
    weight_bytes: int


def segments(block_bytes: Sequence[int], ends_bytes: int, limit: int) -> list[Segment]:
    """Split a model into segments of at most `limit` bytes.

    Args:
        block_bytes: weights of every block.
        ends_bytes: embedding and head, in the first and the last segment.

    Raises:
        OutOfMemory: a single block exceeds the limit.
    """
    if (largest := max(block_bytes, default=0)) > limit:
        raise OutOfMemory(
            msg(
                "One block takes {largest:,.0f} MB, but the GPU only has room for an engine of {limit:,.0f} MB.",
                largest=largest / MB,
                limit=limit / MB,
            ),
            msg("Choose a smaller model, or close what else uses the GPU."),
        )
    runs: list[Segment] = []
    first, held = 0, ends_bytes
    for index, size in enumerate(block_bytes):
        if held + size > limit and index > first:
            runs.append(Segment(first, index, held))
            first, held = index, 0
        held += size
    return [*runs, Segment(first, len(block_bytes), held)]


def cut(path: Path, runs: Sequence[Segment]) -> list[Path]:
    """Write a graph beside `path` for each of `runs`; see `chained` for running them.

    Raises:
        Unsupported: the nodes do not name their blocks.
    """
    model = onnx.load(path, load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    places = _places(model.graph, runs)
    return [_write(model, places, run, path.with_name(f"{path.stem}-{run + 1}.onnx")) for run in range(len(runs))]


def _places(graph: onnx.GraphProto, runs: Sequence[Segment]) -> list[int]:
    """The segment of every node: that of its block, or the latest among its inputs."""
    made: dict[str, int] = {}
    places: list[int] = []
    named: set[int | None] = set()
    for node in graph.node:
        block = _block(node)
        own = next((index for index, run in enumerate(runs) if block is not None and block < run.last), 0)
        named.add(block)
        place = max([own, *(made.get(name, 0) for name in node.input)])
        made.update(dict.fromkeys(node.output, place))
        places.append(place)
    if not set(range(runs[-1].last)) <= named:
        raise Unsupported(
            msg("The nodes of the graph do not name their blocks, so it cannot be split."),
            msg("Free some GPU memory, or choose a smaller model."),
        )
    return places


def _block(node: onnx.NodeProto) -> int | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    found = _BLOCK.search(scopes)
    return int(found.group(1)) if found else None


def _write(model: onnx.ModelProto, places: Sequence[int], run: int, path: Path) -> Path:
    graph = model.graph
    nodes = [node for node, place in zip(graph.node, places, strict=True) if place == run]
    later = {name for node, place in zip(graph.node, places, strict=True) if place > run for name in node.input}
    made = {name for node in nodes for name in node.output}
    taken = {name for node in nodes for name in node.input if name} - made
    weights = [weight for weight in graph.initializer if weight.name in taken]
    types = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    given = [value.name for value in graph.output]
    inputs = _ordered(types, taken - {weight.name for weight in weights}, graph)
    outputs = _ordered(types, {n for n in made if n in later or n in given}, graph)
    part = onnx.helper.make_graph(
        nodes, f"{graph.name}-{run + 1}", [types[n] for n in inputs], [types[n] for n in outputs], weights
    )
    whole = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    path.write_bytes(whole.SerializeToString())
    return path


def _ordered(types: Mapping[str, Any], names: set[str], graph: onnx.GraphProto) -> list[str]:
    """`names` in the order of the graph; a value without a type cannot be passed between segments."""
    if lost := names - set(types):
        raise Unsupported(
            msg("The type of {lost} in {graph} is unknown.", lost=min(lost), graph=graph.name),
            msg("Free some GPU memory, or choose a smaller model."),
        )
    return [name for name in types if name in names]


def chained(sessions: Sequence[Any], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the segments in order; returns all their outputs by name."""
    values = dict(feeds)
    for session in sessions:
        wanted = {value.name: values[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        values.update(zip(names, session.run(names, wanted), strict=True))
    return {name: value for name, value in values.items() if name not in feeds}
