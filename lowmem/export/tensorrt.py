"""Build TensorRT engines from the fp16 graph, and cache them.

TensorRT 11 has strongly typed networks only (no FP16 or INT8 flags), so types are those of the graph: a generic fp16
export, split into segments of blocks (`segments.py`) if it does not fit. An engine works for one GPU model and one
TensorRT version, which are part of its path. Everything but the builders is tested without a GPU.

https://docs.nvidia.com/deeplearning/tensorrt/latest/ and
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem.errors import DiskFull, MissingDependency, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.export.request import ExportRequest
from lowmem.export.segments import Segment, cut, segments
from lowmem.machine.device import Device
from lowmem.machine.hardware import Hardware, probe
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.planning.placement import block_index
from lowmem.runtime.onnx.manifest import GRAPH
from lowmem.settings import settings
from lowmem.units import GB, MB

log = logging.getLogger("lowmem.tensorrt")

WORKSPACE_SHARE = 0.5
"""Share of the free GPU memory that the builder may use to try kernels."""

SMALLEST_WORKSPACE = 256 * MB

ENGINE_SHARE = 0.6
"""Share of the free GPU memory for the weights of one engine; larger models are split."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes of an engine: minimum, optimum and maximum of every dynamic dimension."""

    batch: tuple[int, int, int] = (1, 1, 4)
    new: tuple[int, int, int] = (1, 1, 512)
    past: tuple[int, int, int] = (0, 512, 2048)


def available(hardware: Hardware | None = None) -> str | None:
    """Why no engine can be built here; None if one can."""
    hardware = hardware or probe()
    gpu = next((device for device in hardware.gpus if device.kind == "cuda"), None)
    if gpu is None:
        return msg("TensorRT needs an NVIDIA GPU; this machine has none.")
    if "fp16" not in gpu.dtypes:
        return msg("TensorRT engines are built in fp16, which {gpu} does not support.", gpu=gpu.name)
    if importlib.util.find_spec("tensorrt") is None and not _has_provider():
        return msg("TensorRT is not installed: pip install tensorrt (or onnxruntime-gpu, with its TensorRT provider).")
    return None


def _has_provider() -> bool:
    """Whether ONNX Runtime has the TensorRT provider, without importing it."""
    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("tensorrt_libs") is not None


def tensorrt_version() -> str:
    """The installed version, "" if there is none."""
    try:
        return version("tensorrt")
    except PackageNotFoundError:
        return ""


def workspace_bytes(gpu: Device) -> int:
    """Memory for the builder: a power of two that leaves room for the weights."""
    share = max(SMALLEST_WORKSPACE, int(gpu.free_bytes * WORKSPACE_SHARE))
    return max(SMALLEST_WORKSPACE, 1 << (share.bit_length() - 1))


def engine_path(graph: Path, gpu: Device, profile: Profile, library: str) -> Path:
    """Cache path of the engine of `graph`, for its content, the GPU, the TensorRT version and the shapes."""
    digest = hashlib.sha256()
    for file in sorted([graph, *graph.parent.glob("*.data")]):
        stat = file.stat()
        digest.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    digest.update(repr(profile).encode())
    place = re.sub(r"[^A-Za-z0-9]+", "-", f"{gpu.name}-trt{library or 'none'}").strip("-").lower()
    return settings().home / "engines" / place / f"{digest.hexdigest()[:16]}.plan"


def shape_ranges(inputs: Sequence[tuple[str, Sequence[Any]]], profile: Profile) -> dict[str, list[tuple[int, ...]]]:
    """Minimum, optimum and maximum shape of every input; `inputs` are names and shapes with named dimensions."""
    found = {}
    for name, shape in inputs:
        ranges = []
        for place in range(3):
            sizes = {
                "batch": profile.batch[place],
                "new": profile.new[place],
                "past": profile.past[place],
                "all": profile.new[place] + profile.past[place],
            }
            ranges.append(tuple(size if isinstance(size, int) else sizes[_size_name(size)] for size in shape))
        found[name] = ranges
    return found


def _size_name(name: str) -> str:
    """The exporter may replace the dimension "all" by a sum."""
    return "all" if "+" in name else name


def provider(gpu: Device, cache: Path, inputs: Sequence[tuple[str, Sequence[Any]]], profile: Profile) -> list[Any]:
    """Providers of an ONNX Runtime session, TensorRT first, with its options."""
    ranges = shape_ranges(inputs, profile)

    def shapes(place: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape[place]))}" for name, shape in ranges.items())

    options = {
        "device_id": gpu.key.rpartition(":")[2] or "0",
        "trt_max_workspace_size": str(workspace_bytes(gpu)),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": shapes(0),
        "trt_profile_opt_shapes": shapes(1),
        "trt_profile_max_shapes": shapes(2),
    }
    return [("TensorrtExecutionProvider", options), "CUDAExecutionProvider", "CPUExecutionProvider"]


def graph_inputs(graph: Path) -> list[tuple[str, list[int | str]]]:
    """Names and shapes of the inputs of a graph file."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    return [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in model.graph.input
    ]


def build_engine(graph: Path, engine: Path, gpu: Device, profile: Profile) -> None:
    """Build and save the engine of a strongly typed fp16 `graph` with TensorRT's own builder.

    Raises:
        MissingDependency: TensorRT is not installed. DiskFull: there is no room for the engine.
        Unsupported: TensorRT cannot parse or build it, with its error message.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise MissingDependency(msg("TensorRT is not installed."), "pip install tensorrt") from error
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # the only kind there is from TensorRT 11 on
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise Unsupported(
            msg("TensorRT cannot read the graph: {reasons}", reasons=reasons[:300]),
            msg("Run it with ONNX Runtime instead."),
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(gpu))
    shapes = builder.create_optimization_profile()
    for name, ranges in shape_ranges(graph_inputs(graph), profile).items():
        shapes.set_shape(name, *ranges)
    config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise Unsupported(
            msg("TensorRT could not build an engine from the graph."), msg("Lower the workspace or the context.")
        )
    engine.parent.mkdir(parents=True, exist_ok=True)
    part = engine.with_suffix(".part")
    try:
        part.write_bytes(memoryview(built))
        part.replace(engine)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            msg("The disk is full; the engine of {built:,} bytes was not saved.", built=len(memoryview(built))),
            msg("Free some space."),
        ) from error


def build_by_provider(graph: Path, cache: Path, gpu: Device, profile: Profile) -> None:
    """Let ONNX Runtime's TensorRT provider build the engine of `graph` in the folder `cache`.

    Raises:
        Unsupported: this ONNX Runtime has no TensorRT provider, or it does not support the graph. See also `open_session`.
    """
    from lowmem.runtime.onnx.model import open_session

    cache.mkdir(parents=True, exist_ok=True)
    session = open_session(graph, providers=provider(gpu, cache, graph_inputs(graph), profile))
    if "TensorrtExecutionProvider" not in session.get_providers():
        raise Unsupported(msg("ONNX Runtime's TensorRT provider did not load."), "pip install tensorrt")


def engine_of(graph: Path, gpu: Device, profile: Profile) -> Path:
    """The engine of `graph`, cached or built now: a file of TensorRT's builder, or a folder of the provider."""
    own = importlib.util.find_spec("tensorrt") is not None
    engine = engine_path(graph, gpu, profile, tensorrt_version())
    engine = engine if own else engine.with_suffix("")
    if not engine.exists():
        (build_engine if own else build_by_provider)(graph, engine, gpu, profile)
    return engine


def export_engine(folder: Path, request: ExportRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """The verified fp16 graph of the model in `folder`, and its engines in the cache; the last event is the receipt.

    Raises:
        Unsupported: there is no GPU or no TensorRT, naming the missing piece. See also `export_folder`.
        OutOfMemory: not even one block fits the GPU.
    """
    from lowmem.export.pipeline import export_folder

    hardware = probe()
    if missing := available(hardware):
        raise Unsupported(missing, msg("Choose ONNX, which runs everywhere."))
    gpu, profile = hardware.gpus[0], Profile()
    runs = model_segments(read_spec(str(folder)), gpu)
    request, out = replace(request, options=replace(request.options, precision="fp16", fused=False)), request.out
    receipt: Receipt | None = None
    for event in export_folder(folder, request, cancel):
        if isinstance(event, Receipt):
            receipt = event
        else:
            yield event
    assert receipt is not None  # the last event of every export
    graphs = [out / GRAPH] if len(runs) == 1 else cut(out / GRAPH, runs)
    engines = []
    for number, graph in enumerate(graphs, 1):
        yield Step(
            number - 1,
            len(graphs),
            msg("Building engine {number} of {graphs} for {gpu}", number=number, graphs=len(graphs), gpu=gpu.name),
        )
        engines.append(engine_of(graph, gpu, profile))
    sizes = [sum(file.stat().st_size for file in (e.iterdir() if e.is_dir() else [e])) for e in engines]
    details = receipt.details | {"engines": [str(engine) for engine in engines], "engine_bytes": sum(sizes)}
    yield replace(receipt, precision="fp16", device=gpu.key, details=details)


def model_segments(spec: ModelSpec, gpu: Device) -> list[Segment]:
    """Segments of a model in fp16 for `gpu`: a single one if it fits."""
    sizes, ends = [0] * spec.layers, 0
    for tensor in spec.tensors:
        index = block_index(tensor.name)
        if index is None or index >= spec.layers:
            ends += 2 * tensor.elements
        else:
            sizes[index] += 2 * tensor.elements
    return segments(sizes, ends, int(max(gpu.free_bytes, GB // 2) * ENGINE_SHARE))
