"""The files of a quantized checkpoint other than its weights: configuration and tokenizer.

The configuration goes where transformers, vLLM, GPTQModel and lowmem look for it: into config.json, and, in the formats
of AutoGPTQ and AutoAWQ, into quantize_config.json as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.models.encoded import PACKED_ROWS
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.model_files import COMPANIONS, CONFIG
from lowmem.quant.request import QuantizeRequest

QUANTIZE_CONFIG = "quantize_config.json"


def write_companions(
    source: Path, folder: Path, request: QuantizeRequest, wide: Sequence[str], tables: Mapping[str, int]
) -> None:
    """Copy tokenizer and configuration from `source` to `folder`, and add how the weights are quantized.

    Args:
        wide: linear layers of the blocks that are not quantized, see `Method.skipping`.
        tables: stored name of every weight that is a packed table, and its bits.
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    method = request.method
    quantization = method.config(request.options) | (method.skipping(wide) if wide else {})
    if tables:
        quantization[PACKED_ROWS] = {name: {"bits": bits} for name, bits in tables.items()}
    config = read_object(LocalFolder(source), CONFIG)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    config.pop("torch_dtype", None)
    config |= {"dtype": "float16" if stored == "float32" else stored, "quantization_config": quantization}
    _write_json(folder / CONFIG, config)
    if method.config_file:
        _write_json(folder / QUANTIZE_CONFIG, quantization)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
