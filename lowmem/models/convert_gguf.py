"""Converting a GGUF file to a folder of safetensors, in a child process.

What dequantizing takes is free again when that exits. Run as
`python -m lowmem.models.convert_gguf FILE FOLDER DTYPE`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from lowmem.background import run_child
from lowmem.errors import CorruptModel, OutOfMemory, file_error, is_out_of_memory
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.models.describe import describe_gguf
from lowmem.models.download import ensure_room
from lowmem.models.files import LocalFile
from lowmem.models.gguf_file import gguf_parts, read_ggufs
from lowmem.models.spec import DTYPE_BYTES, ModelSource
from lowmem.units import GB, format_bytes

log = logging.getLogger(__name__)

_SHARD = 2 * GB
_EXACT_BELOW = 4 * GB

NO_TOKENIZER, NO_MEMORY, REFUSED = 3, 4, 5
"""Exit statuses of the child; before the last it prints the error's number and the file that the system refused."""


def convert(gguf: Path, folder: Path, cancel: CancelToken) -> Iterator[Step]:
    """Write the model in `gguf` to `folder` for transformers, tokenizer and chat template included.

    fp32 preserves the dequantized values exactly. A model larger than 4 GB in fp32 is stored in fp16, whose rounding
    error is far below that of any GGUF type.

    Raises:
        CorruptModel, Unsupported: a file that cannot be converted.
        DiskFull, OutOfMemory, Cancelled.
    """
    spec = describe_gguf(
        [LocalFile(gguf.with_name(name)) for name in gguf_parts(gguf.name)], ModelSource(str(gguf), gguf.name)
    )
    dtype = "fp32" if spec.parameters * 4 <= _EXACT_BELOW else "fp16"
    size = spec.parameters * DTYPE_BYTES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    ensure_room(folder, size, msg("Converting {gguf}", gguf=gguf.name))
    command = [sys.executable, "-m", "lowmem.models.convert_gguf", str(gguf), str(folder), dtype]
    root = Path(__file__).parents[2]
    status, problem = yield from run_child(command, msg("Converting {gguf}, once", gguf=gguf.name), cancel, cwd=root)
    if status == NO_MEMORY or status < 0:
        raise OutOfMemory(
            msg(
                "Converting {gguf} was killed (signal {status}); it needs about {size} of RAM.",
                gguf=gguf.name,
                status=-status,
                size=format_bytes(2 * size),
            )
            if status < 0
            else msg(
                "Memory ran out while {gguf} was converted, which takes about {size}.",
                gguf=gguf.name,
                size=format_bytes(2 * size),
            ),
            msg("Close other programs, or choose a smaller model."),
        )
    if status == REFUSED:
        number, path = json.loads(problem)
        raise file_error(OSError(number, os.strerror(number), path), msg("{gguf} was not converted", gguf=gguf.name))
    if status == NO_TOKENIZER:
        log.error("the tokenizer of %s: %s", gguf, problem)
        raise CorruptModel(
            msg("{gguf} has no tokenizer that can be read.", gguf=gguf.name),
            msg("Choose another GGUF file of this model; the log has the details."),
        )
    if status:
        log.error("converting %s failed with status %d: %s", gguf, status, problem)
        raise CorruptModel(
            msg("{gguf} cannot be converted: its weights could not be read.", gguf=gguf.name),
            msg("Choose another GGUF file; the log has the details."),
        )


def main(gguf: str, folder: str, dtype: str) -> None:
    """The child: convert, and say by the exit status what went wrong."""
    try:
        _convert(gguf, folder, dtype)
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            sys.exit(NO_MEMORY)
        if isinstance(error, OSError) and error.errno:
            print(json.dumps([error.errno, error.filename2 or error.filename]), file=sys.stderr)
            sys.exit(REFUSED)
        sys.exit(1)


def _convert(gguf: str, folder: str, dtype: str) -> None:
    """Dequantize one tensor after the other, and save it under its name in transformers."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from lowmem.models.checkpoint_writer import write_shards
    from lowmem.models.gguf_tensors import Converter

    parts = [Path(gguf).with_name(name) for name in gguf_parts(Path(gguf).name)]
    header = read_ggufs([LocalFile(part) for part in parts])
    converter = Converter(header, parts, {"fp32": torch.float32, "fp16": torch.float16}[dtype])
    write_shards(Path(folder), converter.tensors(), _SHARD)
    converter.config.save_pretrained(folder)
    GenerationConfig.from_model_config(converter.config).save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(str(parts[0].parent), gguf_file=parts[0].name).save_pretrained(folder)
    except Exception as error:
        if getattr(error, "errno", None) or is_out_of_memory(error):  # not of the tokenizer
            raise
        traceback.print_exc()
        sys.exit(NO_TOKENIZER)


if __name__ == "__main__":
    main(*sys.argv[1:])
