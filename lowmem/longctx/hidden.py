"""Writes hidden states of texts of any length to a file, window by window.

Every token's state comes from the first window that contains the token, where it has at least `window - stride` tokens of
context, or all of the text before it. Only the states of one pass are in memory. The file is written in order and can
be memory-mapped (`numpy.load(path, mmap_mode="r")`, `safetensors.safe_open`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.errors import BadInput, CorruptModel, DiskFull, file_errors
from lowmem.events import CancelToken, Step
from lowmem.generate.decoding import cancellable, decoder_blocks, decoder_config, no_check, tidy_heap
from lowmem.generate.window_limits import check_stride, check_token_window, pass_tokens
from lowmem.longctx.options import ReadingLimit
from lowmem.machine.hardware import disk_free_bytes
from lowmem.machine.monitor import trim_heap
from lowmem.measure.windows import Window, cut
from lowmem.messages import msg
from lowmem.models.meta_model import context_limit
from lowmem.units import format_bytes

FORMATS = (".npy", ".safetensors")
LAST = -1


@dataclass(frozen=True, slots=True)
class Written:
    """Describes the file that was written.

    Args:
        layers: as in transformers' `hidden_states`: 0 for the embeddings, i for the output of block i; the last one is
            normalized.
        offsets: text i has rows offsets[i] to offsets[i + 1].
        windows: number of windows processed.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    windows: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window of one text: `first` is its first new token, which belongs to row `row` of the file."""

    ids: list[int]
    first: int
    row: int


@torch.inference_mode()
def hidden_states(
    model: Any,
    texts: Sequence[Sequence[int]],
    window: int,
    stride: int,
    out: Path,
    *,
    layers: Sequence[int] = (LAST,),
    at_once: int | None = None,
    cancel: CancelToken | None = None,
    check: Callable[[], None] = no_check,
    limit: ReadingLimit | None = None,
) -> Generator[Step, None, Written]:
    """Write the hidden states of `texts` (token ids), one after the other; returns a `Written`.

    A `.npy` file holds [tokens, hidden] for one layer, else [layers, tokens, hidden]; a `.safetensors` file holds one
    tensor "layer_<n>" [tokens, hidden] per layer. The dtype is the model's, except that bf16 becomes fp32 in `.npy`
    files, which do not support it.

    Args:
        layers: which layers, see `Written`; negative ones count from the end.
        at_once: tokens per pass, up to which short windows are batched; None chooses by device.
        check: called before every pass; may raise.
        limit: of the file's size.

    Raises:
        BadInput: an empty text, a stride larger than the window, a window larger than the model's context, an unknown
            layer, or an unsupported file type.
        NotAllowed, DiskFull, CorruptModel, Cancelled: no file is left behind.
    """
    cancel = cancel or CancelToken()
    chosen = _check(model, texts, window, stride, out, layers)
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    hidden = decoder_config(model).hidden_size
    pieces = _pieces(texts, offsets, window, stride)
    windows_at_once = max(1, (at_once or pass_tokens(model.device.type)) // window)
    with (
        _writer(out, chosen, offsets[-1], hidden, model.dtype, limit) as file,
        cancellable(list(model.modules()), cancel),
        tidy_heap(model),
    ):
        done = windows = size = 0
        yield Step(0, offsets[-1], msg("Computing hidden states"), "tokens")
        for batch in _batches(pieces, windows_at_once):
            check()
            before, size = size, sum(len(piece.ids) for piece in batch)
            if size != before:
                # Passes of different sizes fragment the heap.
                trim_heap()
            for layer, states in enumerate(_states(model, batch, chosen)):
                for piece, row in zip(batch, states, strict=True):
                    file.write(layer, piece.row, row[piece.first : len(piece.ids)])
            done += sum(len(piece.ids) - piece.first for piece in batch)
            windows += len(batch)
            yield Step(done, offsets[-1], msg("Computing hidden states"), "tokens")
    return Written(out, file.shape, file.dtype, chosen, tuple(offsets), windows)


def _check(
    model: Any, texts: Sequence[Sequence[int]], window: int, stride: int, out: Path, layers: Sequence[int]
) -> tuple[int, ...]:
    if not texts or not all(texts):
        raise BadInput(msg("The text is empty."), msg("Use a text with at least one token."))
    check_stride(window, stride)
    check_token_window(window, context_limit(decoder_config(model)))
    if out.suffix not in FORMATS:
        raise BadInput(
            msg("{out} is neither a .npy nor a .safetensors file.", out=out.name),
            msg("Use one of these two file extensions."),
        )
    count = decoder_config(model).num_hidden_layers
    for layer in layers:
        if not -count - 1 <= layer <= count:
            raise BadInput(
                msg("There is no layer {layer}.", layer=layer),
                msg("Use 0 (the embeddings) to {count}, or {last} for the last layer.", count=count, last=LAST),
            )
    return tuple(dict.fromkeys(layer % (count + 1) for layer in layers))


def _pieces(texts: Sequence[Sequence[int]], offsets: Sequence[int], window: int, stride: int) -> Iterator[_Piece]:
    for text, offset in zip(texts, offsets, strict=False):
        for part in cut(len(text), window, stride):
            yield _piece(text, part, offset)


def _piece(text: Sequence[int], part: Window, offset: int) -> _Piece:
    return _Piece(list(text[part.start : part.end]), part.first - part.start, offset + part.first)


def _batches(pieces: Iterator[_Piece], size: int) -> Iterator[Sequence[_Piece]]:
    while batch := list(itertools.islice(pieces, size)):
        yield batch


def _states(model: Any, batch: Sequence[_Piece], layers: Sequence[int]) -> list[Tensor]:
    """Hidden states [windows, tokens, hidden] of each of `layers`; right padding does not affect causal attention."""
    longest = max(len(piece.ids) for piece in batch)
    ids = torch.tensor([piece.ids + [0] * (longest - len(piece.ids)) for piece in batch], device=model.device)
    blocks, found = decoder_blocks(model), dict[int, Tensor]()
    with _listening(blocks, layers, found):
        found[len(blocks)] = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return [found[layer] for layer in layers]


@contextmanager
def _listening(blocks: Sequence[nn.Module], layers: Sequence[int], found: dict[int, Tensor]) -> Iterator[None]:
    """Capture the inputs of the blocks `layers`: hidden state i is the input of block i."""

    def listen(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[layer] = inputs[0] if inputs else named["hidden_states"]

        return note

    wanted = [layer for layer in layers if layer < len(blocks)]
    handles = [blocks[layer].register_forward_pre_hook(listen(layer), with_kwargs=True) for layer in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _File:
    """A file of one matrix per layer that is written row by row.

    It is not memory-mapped: mapped pages would count as this process's memory until the kernel reclaims them.
    """

    def __init__(self, file: IO[bytes], layers: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype) -> None:
        self._file = file
        self._tokens, self._hidden = tokens, hidden
        self.shape = (tokens, hidden) if len(layers) == 1 else (len(layers), tokens, hidden)
        self._dtype = dtype
        self.dtype = str(dtype).removeprefix("torch.")
        if Path(file.name).name.endswith(".npy.part"):
            self._dtype = torch.float32 if dtype == torch.bfloat16 else dtype
            self.dtype = str(self._dtype).removeprefix("torch.")
            header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            file.write(_safetensors_header(layers, tokens, hidden, dtype))
        self._start = file.tell()
        file.truncate(self._start + math.prod(self.shape) * self._dtype.itemsize)

    def write(self, layer: int, row: int, states: Tensor) -> None:
        """Write `states` [tokens, hidden] to rows `row` and following of a layer."""
        if not bool(states.isfinite().all()):
            raise CorruptModel(
                msg("The model produced NaN or infinite hidden states at token {row:,}.", row=row),
                msg("Choose another precision, such as fp32. If that does not help, the weights are damaged."),
            )
        self._file.seek(self._start + (layer * self._tokens + row) * self._hidden * self._dtype.itemsize)
        data = states.to(self._dtype).contiguous().cpu()
        self._file.write(data.view(torch.uint8).numpy().data)


def _safetensors_header(layers: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype) -> bytes:
    size = tokens * hidden * dtype.itemsize
    entries = {
        f"layer_{layer}": {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": [tokens, hidden],
            "data_offsets": [index * size, (index + 1) * size],
        }
        for index, layer in enumerate(layers)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _writer(
    out: Path, layers: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype, limit: ReadingLimit | None
) -> Iterator[_File]:
    """A file that appears under its name only once it is complete."""
    if not out.absolute().parent.is_dir():
        raise BadInput(
            msg("There is no folder {parent}.", parent=out.parent), msg("Choose a path in an existing folder.")
        )
    size, free = _file_bytes(out, layers, tokens, hidden, dtype), disk_free_bytes(out.absolute().parent)
    if limit:
        limit.check_file(size)
    if size > free:
        raise DiskFull(
            msg(
                "The hidden states take {size}, but only {free} of disk space is free.",
                size=format_bytes(size),
                free=format_bytes(free),
            ),
            msg("Use a shorter text, fewer layers or another folder."),
        )
    unfinished = out.with_name(f".{out.name}.part")
    with file_errors(msg("{out} was not written", out=out.name)):
        try:
            with unfinished.open("wb") as file:
                yield _File(file, layers, tokens, hidden, dtype)
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)


def _file_bytes(out: Path, layers: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype) -> int:
    itemsize = 4 if out.suffix == ".npy" and dtype == torch.bfloat16 else dtype.itemsize
    return len(layers) * tokens * hidden * itemsize
