"""Converting a GGUF file to a folder of safetensors, in a child process.

transformers dequantizes with torch, which takes a multiple of the model's size and does not return it to the
system; when a child process exits, all of it is free again. Run as
`python -m lowmem.models.convert_gguf FILE FOLDER DTYPE`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.background import run_child
from lowmem.errors import CorruptModel, OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.models.describe import describe_gguf
from lowmem.models.download import ensure_room
from lowmem.models.files import LocalFile
from lowmem.models.spec import DTYPE_BYTES, ModelSource
from lowmem.units import GB, format_bytes

log = logging.getLogger(__name__)

_SHARD = "2GB"
_EXACT_BELOW = 4 * GB


def convert(gguf: Path, folder: Path, cancel: CancelToken) -> Iterator[Step]:
    """Write the model in `gguf` to `folder` with transformers' `save_pretrained`, tokenizer and chat template included.

    fp32 preserves the dequantized values exactly. A model larger than 4 GB in fp32 is stored in fp16, whose rounding
    error is far below that of any GGUF type.

    Raises:
        CorruptModel, Unsupported: a file that cannot be converted.
        DiskFull, OutOfMemory, Cancelled.
    """
    spec = describe_gguf(LocalFile(gguf), ModelSource(str(gguf), gguf.name))
    dtype = "fp32" if spec.parameters * 4 <= _EXACT_BELOW else "fp16"
    size = spec.parameters * DTYPE_BYTES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    ensure_room(folder, size, msg("Converting {gguf}", gguf=gguf.name))
    command = [sys.executable, "-m", "lowmem.models.convert_gguf", str(gguf), str(folder), dtype]
    root = Path(__file__).parents[2]
    status, problem = yield from run_child(command, msg("Converting {gguf}, once", gguf=gguf.name), cancel, cwd=root)
    if status < 0:
        raise OutOfMemory(
            msg(
                "Converting {gguf} was killed (signal {status}); it needs about {size} of RAM.",
                gguf=gguf.name,
                status=-status,
                size=format_bytes(2 * size),
            ),
            msg("Close other programs, or choose a smaller model."),
        )
    if status:
        log.error("converting %s failed with status %d: %s", gguf, status, problem)
        raise CorruptModel(
            msg("{gguf} cannot be converted: its weights could not be read.", gguf=gguf.name),
            msg("Choose another GGUF file; the log has the details."),
        )


def main(gguf: str, folder: str, dtype: str) -> None:
    """The child: load, dequantize, save."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(Path(gguf).parent), Path(gguf).name
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch_dtype)
    # The weights are dequantized; with this left in place, saving and loading would look for packed ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, max_shard_size=_SHARD)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    config = Path(folder) / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_model_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
