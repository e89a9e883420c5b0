"""TensorRT engines from the fp16 graph: what is missing here, how a model is cut up, where engines are kept, who builds them.

TensorRT 11 knows strongly typed networks only (its FP16 and INT8 flags are gone), so types are those of the graph:
a generic fp16 export. An engine belongs to one GPU model and one TensorRT version, and is kept under both names. Everything but
`build_engine` runs, and is tested, without a GPU.

https://docs.nvidia.com/deeplearning/tensorrt/latest/ and
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem.errors import MissingDependency, OutOfMemory, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.export.manifest import GRAPH
from lowmem.export.options import ExportOptions
from lowmem.machine.hardware import Device, Hardware, probe
from lowmem.settings import settings
from lowmem.units import GB, MB

log = logging.getLogger("lowmem.tensorrt")

WORKSPACE_SHARE = 0.5
"""Of the GPU's free memory, what the builder may use to try kernels."""

SMALLEST_WORKSPACE = 256 * MB

ENGINE_SHARE = 0.6
"""Of the GPU's free memory, what one engine's weights may take; more is cut up by blocks."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes an engine is built for: the smallest, the usual and the largest of every dynamic size."""

    batch: tuple[int, int, int] = (1, 1, 4)
    new: tuple[int, int, int] = (1, 1, 512)
    past: tuple[int, int, int] = (0, 512, 2048)


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks `first` to `last` (exclusive) as one engine; the first takes token ids, the last gives logits."""

    first: int
    last: int
    weight_bytes: int


def available(hardware: Hardware | None = None) -> str | None:
    """The missing piece in a sentence, None where an engine can be built."""
    hardware = hardware or probe()
    gpu = next((device for device in hardware.gpus if device.kind == "cuda"), None)
    if gpu is None:
        return "TensorRT needs an NVIDIA GPU; this machine has none."
    if "fp16" not in gpu.dtypes:
        return f"TensorRT engines are built in fp16, which {gpu.name} does not support."
    if importlib.util.find_spec("tensorrt") is None and not _has_provider():
        return "TensorRT is not installed: pip install tensorrt (or onnxruntime-gpu, with its TensorRT provider)."
    return None


def _has_provider() -> bool:
    """Does ONNX Runtime here bring the TensorRT provider? Asked of the package, not by importing it."""
    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("tensorrt_libs") is not None


def tensorrt_version() -> str:
    """ "" where it is not installed."""
    try:
        return version("tensorrt")
    except PackageNotFoundError:
        return ""


def workspace_bytes(gpu: Device) -> int:
    """What the builder may use, a power of two that leaves the weights their place."""
    share = max(SMALLEST_WORKSPACE, int(gpu.free_bytes * WORKSPACE_SHARE))
    return max(SMALLEST_WORKSPACE, 1 << (share.bit_length() - 1))


def segments(block_bytes: Sequence[int], ends_bytes: int, limit: int) -> list[Segment]:
    """Cut a model into runs of blocks that fit `limit` bytes each.

    Args:
        block_bytes: weights of every block.
        ends_bytes: embedding and head, which the first and the last run carry.

    Raises:
        OutOfMemory: a single block is more than the limit, naming both.
    """
    if (largest := max(block_bytes, default=0)) > limit:
        raise OutOfMemory(
            f"One block takes {largest / MB:,.0f} MB, the GPU has room for {limit / MB:,.0f} MB of an engine.",
            "Choose a smaller model, or close what else uses the GPU.",
        )
    runs: list[Segment] = []
    first, held = 0, ends_bytes
    for index, size in enumerate(block_bytes):
        if held + size > limit and index > first:
            runs.append(Segment(first, index, held))
            first, held = index, 0
        held += size
    return [*runs, Segment(first, len(block_bytes), held)]


def engine_path(graph: Path, gpu: Device, profile: Profile, library: str) -> Path:
    """Where the engine of `graph` is kept: by its content, the GPU, the TensorRT version and the shapes."""
    digest = hashlib.sha256()
    for file in sorted(graph.parent.glob(f"{graph.name}*")):
        stat = file.stat()
        digest.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    digest.update(repr(profile).encode())
    place = re.sub(r"[^A-Za-z0-9]+", "-", f"{gpu.name}-trt{library or 'none'}").strip("-").lower()
    return settings().home / "engines" / place / f"{digest.hexdigest()[:16]}.plan"


def shape_ranges(inputs: Sequence[tuple[str, Sequence[Any]]], profile: Profile) -> dict[str, list[tuple[int, ...]]]:
    """For every input the smallest, usual and largest shape; `inputs` are names and shapes with names for sizes."""
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
    """The exporter may write a sum for what was called "all"."""
    return "all" if "+" in name else name


def provider(gpu: Device, cache: Path, inputs: Sequence[tuple[str, Sequence[Any]]], profile: Profile) -> list[Any]:
    """Providers for an ONNX Runtime session, TensorRT first: its options as the provider names them."""
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
    """Names and shapes of a graph's inputs, read from the file."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    return [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in model.graph.input
    ]


def build_engine(graph: Path, engine: Path, gpu: Device, profile: Profile) -> None:
    """Build and save the engine of a strongly typed fp16 `graph` with TensorRT's own builder.

    Raises:
        MissingDependency: TensorRT is not installed.
        Unsupported: TensorRT cannot parse or build it, with its own words.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise MissingDependency("TensorRT is not installed.", "pip install tensorrt") from error
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # the only kind there is from TensorRT 11 on
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise Unsupported(f"TensorRT cannot read the graph: {reasons[:300]}", "Run it with ONNX Runtime instead.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(gpu))
    shapes = builder.create_optimization_profile()
    for name, ranges in shape_ranges(graph_inputs(graph), profile).items():
        shapes.set_shape(name, *ranges)
    config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise Unsupported("TensorRT could not build an engine from the graph.", "Lower the workspace or the context.")
    engine.parent.mkdir(parents=True, exist_ok=True)
    part = engine.with_suffix(".part")
    part.write_bytes(memoryview(built))
    part.replace(engine)


def export_engine(
    folder: Path,
    out: Path,
    options: ExportOptions,
    *,
    ref: str = "",
    ram_limit: int | None = None,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """The fp16 graph of a model, proven, in `out`, and its engine in the cache; the last event is the receipt.

    Raises:
        Unsupported: there is no GPU or no TensorRT, naming the missing piece. See also `export_model`.
    """
    from lowmem.export.pipeline import export_model

    hardware = probe()
    if missing := available(hardware):
        raise Unsupported(missing, "Choose ONNX, which runs everywhere.")
    gpu, profile = hardware.gpus[0], Profile()
    receipt: Receipt | None = None
    for event in export_model(
        folder, out, replace(options, precision="fp16", fused=False), ref=ref, ram_limit=ram_limit, cancel=cancel
    ):
        if isinstance(event, Receipt):
            receipt = event
        else:
            yield event
    assert receipt is not None  # the last event of every export
    engine = engine_path(out / GRAPH, gpu, profile, tensorrt_version())
    yield Step(0, 0, f"Building the engine for {gpu.name}")
    if not engine.is_file():
        build_engine(out / GRAPH, engine, gpu, profile)
    details = receipt.details | {"engine": str(engine), "engine_bytes": engine.stat().st_size}
    yield replace(receipt, precision="fp16", device=gpu.key, details=details)


def model_segments(block_bytes: Sequence[int], ends_bytes: int, gpu: Device) -> list[Segment]:
    """How a model is cut up for `gpu`: one engine where it fits, else runs of blocks."""
    return segments(block_bytes, ends_bytes, int(max(gpu.free_bytes, GB // 2) * ENGINE_SHARE))
