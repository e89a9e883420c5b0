"""Write a Llama-like model as a fused graph, streamed from its checkpoint: peak memory is that of quantizing its largest matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lowmem.events import CancelToken, Step
from lowmem.export.fused import FusedDecoder, GraphLayers
from lowmem.export.graph import Graph, WeightFile
from lowmem.export.linears import Blocks, Dense, Dynamic, rounding
from lowmem.export.weights import Source
from lowmem.kernels.int8_linear import largest_code
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.matching import match_names
from lowmem.models.modules import empty_model
from lowmem.models.spec import ModelSpec
from lowmem.planning.exported import HEAD_BITS, HEAD_GROUP
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import DATA, GRAPH, PREFILL


def write_decoder(
    folder: Path, out: Path, spec: ModelSpec, options: ExportOptions, cancel: CancelToken
) -> Iterator[Step]:
    """Write the graphs of the model in `folder` into `out`.

    Raises:
        CorruptModel, Unsupported: see `match_names`; or weights are NaN or infinite.
        DiskFull, Cancelled.
    """
    model = empty_model(folder)
    with Checkpoint(folder) as checkpoint, WeightFile(out / DATA) as weights:
        source = Source(checkpoint, match_names(model, checkpoint), spec.stored)
        written = graphs(options, cancel)
        for position, (name, layers) in enumerate(written.items()):
            graph = Graph(weights)
            for step in FusedDecoder(model, spec.blocks, source, graph, layers).write(spec.layer_types, cancel):
                yield replace(step, done=position * step.total + step.done, total=len(written) * step.total)
            graph.save(out / name, {"model": spec.name, "precision": options.precision})


def graphs(options: ExportOptions, cancel: CancelToken) -> dict[str, GraphLayers]:
    """File name -> layers of each graph of the folder."""
    if options.precision in ("fp32", "fp16"):
        dtype = np.float32 if options.precision == "fp32" else np.float16
        return {GRAPH: GraphLayers(Dense(dtype), Dense(dtype), dtype=dtype)}
    # A 4-bit head would raise the mean KL of the demo model from 0.22 to 0.32 for 4% more speed.
    head = Blocks(rounding(HEAD_BITS, HEAD_GROUP, cancel), HEAD_BITS, HEAD_GROUP)
    bits, group = (4, options.group_size) if options.precision == "int4" else (HEAD_BITS, HEAD_GROUP)
    found = {GRAPH: GraphLayers(Blocks(rounding(bits, group, cancel), bits, group), head, head)}
    if options.has_prefill:
        found[PREFILL] = GraphLayers(Dynamic(largest_code()), None, head)
    return found
