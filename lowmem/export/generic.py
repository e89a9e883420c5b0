"""Any architecture as a graph, by PyTorch's own exporter: the model is traced whole, in fp32, with its cache as inputs.

Decoders get `past_key_values.*` and return `present.*`; encoders take what their tokenizer makes. Smaller precisions
are ONNX Runtime's: dynamic int8 per channel, 4-bit blocks, fp16.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.errors import MissingDependency, Unsupported
from lowmem.events import CancelToken, Step
from lowmem.export.manifest import DATA, GRAPH
from lowmem.export.options import ExportOptions
from lowmem.machine.processor import has_vnni
from lowmem.models.config import is_encoder

log = logging.getLogger("lowmem.export")

_SAMPLE = (2, 5, 3)
"""Rows, new and past tokens of the traced example; each stands for any number."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of exporters and quantizers out of the logs, and undo what they do to logging on import."""
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
    """A causal model whose cache is a list of tensors: key and value of layer 0, of layer 1, and so on."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache(zip(past[0::2], past[1::2], strict=True))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present


def write_generic(folder: Path, out: Path, options: ExportOptions, cancel: CancelToken) -> Iterator[Step]:
    """Write the graph of the model in `folder` into `out`.

    Raises:
        Unsupported: the exporter cannot trace it. MissingDependency: onnxscript is not installed. Cancelled.
    """
    yield Step(0, 3, "Loading the model")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    encoder = is_encoder(config.model_type)
    kind: Any = AutoModel if encoder else AutoModelForCausalLM
    model = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
    ).eval()
    _plain_linears(model)
    cancel.check()
    yield Step(1, 3, "Tracing the model")
    trace = _encoder_arguments if encoder else _decoder_arguments
    with quiet():
        _export(trace(model), out / GRAPH)
    del model
    cancel.check()
    yield Step(2, 3, f"Converting to {options.precision}")
    if options.precision != "fp32":
        with quiet():
            _CONVERSIONS[options.precision](out / GRAPH, options)
    yield Step(3, 3, "Written")


def _plain_linears(model: nn.Module) -> None:
    """GPT-2's layers, whose weights lie the other way round, as `Linear`: what quantizers look for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight, linear.bias = nn.Parameter(module.weight.t().contiguous()), module.bias
            model.set_submodule(name, linear)


def _decoder_arguments(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, new, past = _SAMPLE
    cache = [torch.randn(rows, heads, past, width) for _ in range(2 * config.num_hidden_layers)]
    batch, fresh, old, everything = (torch.export.Dim(n) for n in ("batch", "new", "past", "all"))
    names = [f"{index}.{part}" for index in range(config.num_hidden_layers) for part in ("key", "value")]
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


def _export(arguments: dict[str, Any], path: Path) -> None:
    module, args = arguments.pop("model"), arguments.pop("args")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, args, dynamo=True, optimize=True, verbose=False, opset_version=21, **arguments
            )
            assert program is not None  # as documented for dynamo
            program.save(path, external_data=True)
    except ImportError as error:
        raise MissingDependency(f"PyTorch's exporter needs {error.name}.", "pip install onnx onnxscript") from error
    except Exception as error:
        log.info("cannot trace the model", exc_info=True)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Unsupported(
            f"PyTorch cannot turn this model into a graph: {reason}", "Choose a model of another family."
        ) from error


def _int8(path: Path, options: ExportOptions) -> None:  # noqa: ARG001
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def convert(source: Path, target: Path) -> None:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not has_vnni(),
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )

    _replace(path, convert)


def _int4(path: Path, options: ExportOptions) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def convert(source: Path, target: Path) -> None:
        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), bits=4, block_size=options.group_size, is_symmetric=False, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=True)

    _replace(path, convert)


def _fp16(path: Path, options: ExportOptions) -> None:  # noqa: ARG001
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    def convert(source: Path, target: Path) -> None:
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
        onnx.save(model, target, save_as_external_data=True, location=DATA)

    _replace(path, convert)


_CONVERSIONS: dict[str, Callable[[Path, ExportOptions], None]] = {"int8": _int8, "int4": _int4, "fp16": _fp16}


def _replace(path: Path, convert: Callable[[Path, Path], None]) -> None:
    """Write the converted graph in the place of the original, whose weights go with it."""
    source = path.with_name("traced")
    source.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(source / file.name)
    convert(source / path.name, path)
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
