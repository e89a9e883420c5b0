"""Run an exported model in the decode loop, in place of a transformers model. Its KV caches are in `cache.py`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem.errors import CorruptModel, LowMemError, MissingDependency, OutOfMemory, Unsupported, is_out_of_memory
from lowmem.machine.processor import cores, has_vnni
from lowmem.messages import msg
from lowmem.models.generation_config import generation_config
from lowmem.models.modules import folder_config
from lowmem.planning import exported
from lowmem.runtime.onnx.cache import Binding, GrowingCache, InPlaceCache
from lowmem.runtime.onnx.manifest import GRAPH, KEEP, PREFILL, Manifest, read_manifest

log = logging.getLogger("lowmem.onnx")

SMALLEST_PIECE, LARGEST_PIECE, PIECE_WORK = 32, 512, 40e9
"""Tokens and multiplications of a prefill pass: less than a second on two slow cores, so that Stop works. The size depends
on the model, not on time, because other chunks round differently: the same seed must give the same answer."""

_VNNI_RANGE = 127
_AGAIN = msg("Export the model again.")
_UPGRADE = msg("Update it: pip install -U onnxruntime")

_NEWER = {
    "opset": re.compile(r"Opset (\d+) is under development.* is till opset (\d+)"),
    msg("ONNX IR version"): re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)"),
}
_NO_OPERATOR = re.compile(r"(?:No Op registered for|Could not find an implementation for) (\w[\w.:]*)")
_WRAPPING = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?|\S+\.(?:cc|h):\d+ ")


def open_session(
    path: Path,
    *,
    threads: int = 0,
    saturates: bool = False,
    providers: Sequence[Any] = (),
    frugal: bool = False,
    arena: bool = True,
) -> Any:
    """An inference session of the graph in `path`.

    Args:
        threads: threads per operator; 0 for one per core of this process.
        frugal: dequantize weights when they are needed and keep no copy, which is slow.
        arena: allocate from blocks that double in size and are kept, which is fast; else each buffer at its own size.
        saturates: the graph's 8-bit weights would overflow AVX2's 16-bit sums.

    Raises:
        MissingDependency, CorruptModel, Unsupported, OutOfMemory.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingDependency(  # noqa: B904
            msg("onnxruntime, which runs exported models, is not installed."), "pip install onnxruntime"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or cores(), 1
    options.log_severity_level = 3
    # Allocate initializers outside the arena, which grows in powers of two and never shrinks.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_cpu_mem_arena = arena
    if frugal:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False
    if saturates:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(
            path,
            options,
            providers=list(providers) or ["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if frugal else [],
        )
    except Exception as error:
        raise _session_error(path, error) from error
    session.disable_fallback()
    return session


def _session_error(path: Path, error: Exception) -> LowMemError:
    """The message of ONNX Runtime without its file names and error codes."""
    text = " ".join(str(error).split()) or type(error).__name__
    log.info("cannot open %s", path, exc_info=True)
    for kind, pattern in _NEWER.items():
        if found := pattern.search(text):
            return Unsupported(
                msg(
                    "{path} uses {kind} {found}, but ONNX Runtime {runtime_version} supports at most {supported}.",
                    path=path.name,
                    kind=kind,
                    found=found[1],
                    runtime_version=exported.runtime_version(),
                    supported=found[2],
                ),
                _UPGRADE,
            )
    if found := _NO_OPERATOR.search(text):
        return Unsupported(
            msg(
                "ONNX Runtime {runtime_version} has no {found}, which {path} needs.",
                runtime_version=exported.runtime_version(),
                found=found[1],
                path=path.name,
            ),
            _UPGRADE,
        )
    if is_out_of_memory(error) or "alloc" in text.lower():
        return OutOfMemory(
            msg("Memory ran out while loading {path}.", path=path.name), msg("Choose fewer bits or a smaller model.")
        )
    if "external data" in text.lower() or "external initializer" in text.lower():
        return CorruptModel(
            msg("The weights of {path} are missing, truncated or outside its folder.", path=path.name), _AGAIN
        )
    return CorruptModel(
        msg("{path} cannot be loaded: {text}", path=path.name, text=_WRAPPING.sub("", text)[:200]), _AGAIN
    )


def _returning_memory() -> Any:
    """Options of a run that shrinks the arena of the CPU when it ends."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


class OnnxModel:
    """Has the interface of a causal model of transformers: `config`, `device`, `forward`, `modules`.

    Args:
        opened: opens the session of a graph, with the arguments of `open_session`.
        arena: see `open_session`.

    Raises:
        CorruptModel, Unsupported, MissingDependency, OutOfMemory: on opening.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    own_threads = True

    def __init__(
        self, folder: Path, *, threads: int = 0, opened: Callable[..., Any] = open_session, arena: bool = True
    ) -> None:
        self.manifest: Manifest = read_manifest(folder)
        self.config = folder_config(folder)
        self.generation_config = generation_config(folder)
        saturates = self.manifest.int8_range == _VNNI_RANGE and not has_vnni()
        arguments: dict[str, Any] = {"threads": threads, "saturates": saturates, "arena": arena}
        self._arena = arena
        self.session = opened(folder / GRAPH, **arguments)
        inputs = [value.name for value in self.session.get_inputs()]
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.past = {
            name: (int(shapes[name][1]), int(shapes[name][3])) for name in inputs if name.startswith("past_key_values.")
        }
        if not self.past:
            raise Unsupported(
                msg("The graph in {folder} has no KV cache, so it cannot generate text.", folder=folder.name),
                msg("Export a text generation model."),
            )
        self.keeps_logits = KEEP in [value.name for value in self.session.get_overridable_initializers()]
        self.has_positions = "position_ids" in inputs
        self.cache_type = {"tensor(float16)": np.float16}.get(
            self.session.get_inputs()[inputs.index(next(iter(self.past)))].type, np.float32
        )
        self.in_place = self.manifest.kind == "fused"
        self.prefill = opened(folder / PREFILL, **arguments) if PREFILL in self.manifest.files else None
        parameters = sum(math.prod(shape) for _, _, shape, _ in self.manifest.model_tensors)
        self.piece = max(SMALLEST_PIECE, min(LARGEST_PIECE, 2 ** round(math.log2(PIECE_WORK / max(1, parameters)))))
        self._hooks: list[Callable[[Any, tuple[object, ...]], None]] = []

    @property
    def exact(self) -> bool:
        """Whether everything is computed in fp32. Other graphs round activations."""
        return self.manifest.precision == "fp32"

    @property
    def base_model(self) -> OnnxModel:
        """The decoder and the head are one graph."""
        return self

    def modules(self) -> Iterator[OnnxModel]:
        yield self

    def register_forward_pre_hook(self, hook: Callable[[Any, tuple[object, ...]], None]) -> Any:
        """`hook` is called before every run of a graph, and may raise."""
        self._hooks.append(hook)
        return SimpleNamespace(remove=lambda: self._hooks.remove(hook))

    def make_cache(self, rows: int, capacity: int) -> InPlaceCache | GrowingCache:
        """An empty cache for at most `rows` sequences of `capacity` tokens."""
        return InPlaceCache(self, rows, capacity) if self.in_place else GrowingCache(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InPlaceCache | GrowingCache | None = None,
        use_cache: bool | None = None,  # noqa: ARG002  part of the interface
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """`logits` float32 [rows, tokens, vocabulary]; of the last token alone where `logits_to_keep` is 1."""
        rows, tokens = input_ids.shape
        cache = past_key_values if past_key_values is not None else self.make_cache(rows, tokens)
        ids = input_ids.numpy()
        mask = None if attention_mask is None else attention_mask.numpy()
        if isinstance(cache, InPlaceCache):
            logits = cache.extend(ids, mask, keep_all=logits_to_keep != 1)
        else:
            logits = cache.extend(ids, mask, None if position_ids is None else position_ids.numpy())
        return SimpleNamespace(logits=torch.from_numpy(logits).float())

    __call__ = forward

    def run(self, session: Any, binding: Binding, *, last: bool = False) -> None:
        """One run of a graph, preceded by the hooks.

        Args:
            last: of a text. The session then returns what its arena holds, which would stay with it and be charged to the
                next, shorter text.

        Raises:
            OutOfMemory: ONNX Runtime could not allocate.
        """
        for hook in self._hooks:
            hook(self, ())
        try:
            session.run_with_iobinding(binding.io, _returning_memory() if last and self._arena else None)
        except Exception as error:
            if is_out_of_memory(error) or "alloc" in str(error).lower():
                raise OutOfMemory(
                    msg("Memory ran out in ONNX Runtime."), msg("Shorten the prompt, or load fewer bits.")
                ) from error
            raise
