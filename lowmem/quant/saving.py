"""A quantized checkpoint beside its weights: configuration, tokenizer, model card.

The configuration is that of AutoGPTQ and AutoAWQ, in quantize_config.json as well as in config.json, so that
transformers, vLLM, GPTQModel and lowmem all find it; that of bitsandbytes and compressed-tensors is in config.json only.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem.events import Receipt
from lowmem.kernels.packing import to_awq, to_gptq
from lowmem.kernels.quantized import Packed, Quantized
from lowmem.models.describe import COMPANIONS, CONFIG
from lowmem.quant.base import BNB, INT8, Options, Quantizer
from lowmem.quant.serving import vllm
from lowmem.units import format_bytes, format_seconds
from lowmem.version import __version__

QUANTIZE_CONFIG = "quantize_config.json"
CARD = "README.md"


def layer_tensors(weight: Quantized | Packed, layout: str) -> dict[str, Tensor]:
    """What is stored of a quantized layer, by the last part of its names."""
    if isinstance(weight, Packed):
        return weight.tensors
    return to_awq(weight) if layout == "awq" else to_gptq(weight, v2=layout == "gptq_v2")


def quantization_config(method: Quantizer, options: Any) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if options.layout in (BNB, INT8):
        return _bnb_config(options) if options.layout == BNB else _int8_config()
    made_by = {"quantizer": [f"lowmem:{__version__}"], "method": method.name, "options": asdict(options)}
    if options.layout == "awq":
        return {
            "quant_method": "awq",
            "bits": options.bits,
            "group_size": options.group_size,
            "zero_point": not options.symmetric,
            "version": "gemm",
            "modules_to_not_convert": None,
            "meta": made_by,
        }
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": getattr(options, "order", "") == "activation",
        "sym": options.symmetric,
        "lm_head": False,
        "checkpoint_format": options.layout,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": getattr(options, "damping", 0.0),
        "meta": made_by,
    }


def _bnb_config(options: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": options.bits == 4,
        "load_in_8bit": options.bits == 8,
        "bnb_4bit_quant_type": options.type,
        "bnb_4bit_use_double_quant": options.double,
        "bnb_4bit_compute_dtype": options.compute,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": options.threshold,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head"],
    }


def _int8_config() -> dict[str, Any]:
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"strategy": "channel", "dynamic": False},
                "input_activations": scheme | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


def write_companions(source: Path, folder: Path, quantization: dict[str, Any]) -> None:
    """Copy tokenizer and configuration of `source` and say in `folder` how its weights are quantized."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    config.pop("torch_dtype", None)
    config |= {"dtype": "float16" if stored == "float32" else stored, "quantization_config": quantization}
    _write_json(folder / CONFIG, config)
    if quantization["quant_method"] not in (BNB, INT8):
        _write_json(folder / QUANTIZE_CONFIG, quantization)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _served(options: Options) -> str:
    """How vLLM takes the folder, as the card says it."""
    serving = vllm(options)
    if serving is None:
        return ""
    if serving.refusal:
        return f"\n{serving.refusal}\n"
    return f"\nServe it with vLLM, with this folder or its repository in FOLDER's place:\n\n    {serving.line}\n"


def write_card(folder: Path, receipt: Receipt, options: Options, licence: str, calibration: str) -> None:
    """README.md with the receipt of the quantization, as the hub shows it."""
    details = receipt.details
    licence_line = f"license: {licence}\n" if licence else ""
    rows = {
        "Method": receipt.precision,
        "Calibration": calibration or "none",
        "Size": f"{format_bytes(details['original_bytes'])} → {format_bytes(receipt.disk_bytes)}",
        "Bits per quantized weight": f"{details['bits_per_weight']:.2f}",
        "Mean loss of a layer": f"{details['loss']:.2e}",
        "Time": f"{format_seconds(receipt.seconds)} on {receipt.device}",
        "Peak memory": ", ".join(f"{format_bytes(peak)} {memory.upper()}" for memory, peak in receipt.measured.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    used = ", ".join(f"{name} {value}" for name, value in asdict(options).items())
    text = f"""---
{licence_line}library_name: transformers
pipeline_tag: text-generation
tags: [lowmem, quantized, {options.layout.split("_")[0]}, {options.bits}-bit]
---

# {receipt.model}, {options.bits} bits

Quantized by lowmem {__version__}, block by block, from {receipt.model}.

| | |
|---|---|
{table}

The loss of a layer is the squared error of its outputs over their squared size, on the calibration text
(of its weights where there was none). Options: {used}.
{_served(options)}"""
    (folder / CARD).write_text(text, encoding="utf-8")
