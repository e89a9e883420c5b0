"""Optimize a generic graph with ONNX Runtime's transformer optimizer, and report nodes, fusions, bytes and latency.

An optimised graph that is slower, or does not load, is discarded.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Error as ProtobufError

from lowmem.errors import LowMemError
from lowmem.events import Step
from lowmem.export.generic import quiet
from lowmem.messages import msg
from lowmem.models.modules import folder_config
from lowmem.runtime.onnx.manifest import GRAPH
from lowmem.runtime.onnx.model import open_session

log = logging.getLogger("lowmem.export")

REPORT = "optimised.json"

TOKENS, RUNS = 64, 5
"""Latency is the median of `RUNS` runs over `TOKENS` tokens."""

_TYPES = {"gpt2": "gpt2", "phi": "phi", "t5": "t5", "vit": "vit", "clip": "clip"}
"""The optimizer's name of a model type; "bert" for all encoders."""


def optimise(folder: Path, source: Path) -> Iterator[Step]:
    """Optimize the graph in `folder`, exported from the model in `source`, in place; writes `REPORT`."""
    yield Step(0, 1, msg("Optimizing the graph"))
    path = folder / GRAPH
    before = figures(path)
    part = folder / "optimised"
    part.mkdir()
    report: dict[str, Any] = {"before": before, "kept": False}
    try:
        with quiet():
            report["fusions"] = _optimised(path, part / GRAPH, source)
        report["after"] = after = figures(part / GRAPH)
        report["kept"] = after["seconds"] <= 1.05 * before["seconds"]
    except (LowMemError, ProtobufError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        # The optimizer matches patterns and fails on unknown graphs and on those above 2 GB.
        log.info("the optimizer failed", exc_info=True)
        report["failed"] = str(error)[:200] or type(error).__name__
    if report["kept"]:
        for file in folder.glob(f"{GRAPH}*"):
            file.unlink()
    for file in part.iterdir():
        if report["kept"]:
            file.rename(folder / file.name)
        else:
            file.unlink()
    part.rmdir()
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")
    yield Step(1, 1, msg("Optimized") if report["kept"] else msg("The optimizer made no difference"))


def _optimised(path: Path, target: Path, source: Path) -> dict[str, int]:
    from onnxruntime.transformers.optimizer import optimize_model

    config = folder_config(source)
    decoder = config.get_text_config(decoder=True)
    model = optimize_model(
        str(path),
        model_type=_TYPES.get(config.model_type, "bert"),
        num_heads=decoder.num_attention_heads,
        hidden_size=decoder.hidden_size,
        opt_level=0,
        use_gpu=False,
    )
    model.save_model_to_file(str(target), use_external_data_format=True)
    return {name: count for name, count in model.get_fused_operator_statistics().items() if count}


def figures(path: Path) -> dict[str, Any]:
    """Nodes, operators, bytes and the median seconds of a run of the graph in `path`."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    operators = Counter(node.op_type for node in graph.node)
    return {"nodes": len(graph.node), "operators": dict(operators), "bytes": size, "seconds": _seconds(path)}


def _seconds(path: Path) -> float:
    session = open_session(path)
    feeds = {value.name: _sample(value) for value in session.get_inputs()}
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _sample(value: Any) -> np.ndarray:
    if value.name.startswith("past_key_values."):
        dtype = np.float16 if value.type == "tensor(float16)" else np.float32
        return np.zeros((1, value.shape[1], 0, value.shape[3]), dtype)
    if value.name == "position_ids":
        return np.arange(TOKENS, dtype=np.int64)[None]
    return np.ones((1, TOKENS), np.int64)
