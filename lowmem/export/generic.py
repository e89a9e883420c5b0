"""Export any architecture with PyTorch's exporter, in fp32 or fp16, with the KV cache as inputs and outputs.

Decoders take `past_key_values.*`, return `present.*`, and are traced without their matrices (`lazy.py`); encoders are small
and traced with them. `convert.py` quantizes the result.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from lowmem.errors import MissingDependency, Unsupported, first_line, is_out_of_memory
from lowmem.events import CancelToken, Step
from lowmem.export.convert import convert
from lowmem.export.graph import OPSET
from lowmem.export.lazy import LazyModel, fold_except, put_weights
from lowmem.messages import msg
from lowmem.models.anatomy import LayerCache
from lowmem.models.cache_argument import cache_argument
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.meta_model import is_encoder
from lowmem.models.modules import folder_config, text_config
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import DATA, GRAPH

log = logging.getLogger("lowmem.export")

_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")

_SAMPLE = (2, 5, 3)
"""Rows, new and past tokens of the example that is traced; all three are dynamic in the graph."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of exporters and optimizers, and undo their changes to the logging configuration."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


class FlatCache(nn.Module):
    """A causal model with its KV cache as a flat list: key and value of layer 0, of layer 1, ..."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._cache_argument = cache_argument(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache(zip(past[0::2], past[1::2], strict=True))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present


def write_generic(
    folder: Path, out: Path, caches: Sequence[LayerCache], options: ExportOptions, cancel: CancelToken
) -> Iterator[Step]:
    """Write the graph of the model in `folder` into `out`.

    Args:
        caches: what each layer of a decoder caches.

    Raises:
        Unsupported: the exporter cannot trace it. MissingDependency: onnxscript is not installed. Cancelled.
    """
    yield Step(0, 3, msg("Tracing the model"))
    config = text_config(folder_config(folder))
    with quiet():
        # Traced in fp16, the model keeps its norms in fp32; a conversion afterwards would not.
        dtype = torch.float16 if options.precision == "fp16" else torch.float32
        if is_encoder(config):
            _write_encoder(folder, out / GRAPH, dtype)
        else:
            _write_decoder(folder, out / GRAPH, caches, dtype)
    cancel.check()
    yield Step(2, 3, msg("Converting to {precision}", precision=options.precision))
    if options.precision in ("int8", "int4"):
        with quiet():
            convert(out / GRAPH, options, cancel)
    yield Step(3, 3, msg("Written"))


def _write_decoder(folder: Path, path: Path, caches: Sequence[LayerCache], dtype: torch.dtype) -> None:
    with Checkpoint(folder) as checkpoint:
        lazy = LazyModel(folder, checkpoint, dtype)
        # `FlatCache` holds the model by this name.
        readers = {f"model.{name}": read for name, read in lazy.readers.items()}
        traced = _traced(_decoder_arguments(lazy.model, caches, dtype), set(readers))
        put_weights(traced.graph, readers)
        onnx_ir.save(traced, path, external_data=DATA)


def _write_encoder(folder: Path, path: Path, dtype: torch.dtype) -> None:
    model: Any = AutoModel.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
    )
    onnx_ir.save(_traced(_encoder_arguments(model.eval()), set()), path, external_data=DATA)


def _decoder_arguments(model: Any, caches: Sequence[LayerCache], dtype: torch.dtype) -> dict[str, Any]:
    rows, new, past = _SAMPLE
    shapes = [(rows, one.heads, past, width) for one in caches for width in (one.key_dim, one.value_dim)]
    cache = [torch.randn(shape, dtype=dtype) for shape in shapes]
    batch, fresh, old, everything = (torch.export.Dim(n) for n in ("batch", "new", "past", "all"))
    names = [f"{index}.{part}" for index in range(len(caches)) for part in ("key", "value")]
    return {
        "model": FlatCache(model),
        "args": (
            torch.ones(rows, new, dtype=torch.long),
            torch.ones(rows, past + new, dtype=torch.long),
            torch.arange(past, past + new)[None].repeat(rows, 1),
            cache,
        ),
        "input_names": [
            "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)
        ],
        "output_names": ["logits", *(f"present.{name}" for name in names)],
        "dynamic_shapes": (
            {0: batch, 1: fresh}, {0: batch, 1: everything}, {0: batch, 1: fresh}, [{0: batch, 2: old}] * len(cache)
        ),
    }  # fmt: skip


def _encoder_arguments(model: Any) -> dict[str, Any]:
    rows, new, _ = _SAMPLE
    ids = torch.ones(rows, new, dtype=torch.long)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    return {
        "model": _Encoder(model),
        "args": (ids, torch.ones_like(ids)),
        "input_names": ["input_ids", "attention_mask"],
        "output_names": ["last_hidden_state"],
        "dynamic_shapes": ({0: batch, 1: tokens}, {0: batch, 1: tokens}),
    }


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _traced(arguments: dict[str, Any], matrices: set[str]) -> onnx_ir.Model:
    """The graph of a module; nodes with weights named in `matrices` are not folded."""
    module, args = arguments.pop("model"), arguments.pop("args")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, args, dynamo=True, optimize=False, verbose=False, opset_version=OPSET, **arguments
            )
            assert program is not None  # as documented for dynamo
            from onnxscript.optimizer import optimize_ir

            optimize_ir(program.model, should_fold=fold_except(matrices))
            return program.model
    except ImportError as error:
        raise MissingDependency(
            msg("PyTorch's exporter needs {error}.", error=error.name), "pip install onnx onnxscript"
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("cannot trace the model", exc_info=True)
        raise _untraceable(error) from error


def _untraceable(error: BaseException) -> Unsupported:
    """The missing operator, otherwise the root cause: the exceptions above it are advice to developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    hint = msg("Choose a model from another family.")
    if found := _NO_OPERATOR.search(str(error)):
        return Unsupported(
            msg("The model computes with {found}, for which ONNX has no operator.", found=found[1]), hint
        )
    return Unsupported(msg("PyTorch cannot convert this model to a graph: {reason}", reason=first_line(error)), hint)
