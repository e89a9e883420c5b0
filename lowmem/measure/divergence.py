"""How far a model's predictions are from those of its original: mean KL divergence and top-1 agreement.

The two are never in memory together. The original writes its log-probabilities to a file, and the other
is compared with that file, token by token. The file holds -log p in steps of 2^-11 nat in 16 bits (as
llama.cpp's `--kl-divergence-base` does, but with one step for all), from 0 to 32 nats: 2 bytes for each
word of the vocabulary and token. Rounding changes a log-probability by at most 2^-12 nat, and each row is
normalised again when it is read, so that equal models diverge by less than 1e-7; otherwise the error is
below 5e-4 times the mean of |log p - log q|, and as roundings average out, far below.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.errors import BadInput, DiskFull
from lowmem.events import CancelToken, Step
from lowmem.generate.decoding import no_check
from lowmem.measure.perplexity import Perplexity
from lowmem.measure.scoring import Segment, score
from lowmem.measure.windows import Passage
from lowmem.units import format_bytes

STEPS_PER_NAT = 2048
_LARGEST_CODE = 2**16 - 1

_LESS_TEXT = "Free some space or measure fewer tokens."


def reference_bytes(tokens: int, vocabulary: int) -> int:
    """Size of the file of an original's log-probabilities over `tokens` scored tokens."""
    return tokens * (2 * vocabulary + 4)


class Reference:
    """Writes an original's log-probabilities, segment by segment: a header line, then rows of codes and best token.

    Raises:
        DiskFull: before the first byte where it shows in advance, else when it happens.
    """

    def __init__(self, path: Path, passage: Passage, vocabulary: int) -> None:
        needed, free = reference_bytes(passage.scored, vocabulary), shutil.disk_usage(path.parent).free
        if needed > free:
            raise DiskFull(
                f"The original's predictions take {format_bytes(needed)}, but the disk has {format_bytes(free)} left.",
                _LESS_TEXT,
            )
        self._file = path.open("wb")
        self._file.write(json.dumps({"identity": passage.identity, "vocabulary": vocabulary}).encode() + b"\n")

    def add(self, segment: Segment) -> None:
        codes = segment.log_probs.mul(-STEPS_PER_NAT).round_().clamp_(max=_LARGEST_CODE).to(torch.uint16)
        best = segment.log_probs.argmax(dim=1).to(torch.int32)
        rows = np.empty(len(codes), _row_type(codes.shape[1]))
        rows["codes"], rows["best"] = codes.cpu().numpy(), best.cpu().numpy()
        try:
            self._file.write(rows.data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull("The disk is full of the original's predictions.", _LESS_TEXT) from error

    def close(self) -> None:
        self._file.close()


class Divergence:
    """A running comparison of a model with the file that `Reference` wrote.

    `kl` is the sum of KL(original || model) in nats over `tokens` tokens, `agreed` how many of them
    have the same most likely next token.

    Raises:
        BadInput: the file belongs to another text, other windows or another vocabulary.
    """

    def __init__(self, path: Path, passage: Passage, vocabulary: int) -> None:
        self.kl, self.agreed, self.tokens = 0.0, 0, 0
        self._file = path.open("rb")
        header = json.loads(self._file.readline())
        if header["vocabulary"] != vocabulary:
            self.close()
            raise BadInput(
                f"The model knows {vocabulary:,} tokens and the original {header['vocabulary']:,}.",
                "Compare variants of one model.",
            )
        if header["identity"] != passage.identity:
            self.close()
            raise BadInput(
                "The model's tokenizer cuts the text otherwise than the original's.", "Compare variants of one model."
            )
        self._row = _row_type(vocabulary)

    def add(self, segment: Segment) -> None:
        rows = np.frombuffer(self._file.read(len(segment.targets) * self._row.itemsize), self._row)
        # In place, since each of these is as large as the logits: with P = p / Z the divergence is
        # sum(p * (log p - log q)) / Z - log Z.
        ratio = _decoded(rows["codes"], segment.log_probs.device)
        p = ratio.exp()
        z = p.sum(dim=1)
        p.mul_(ratio.sub_(segment.log_probs))
        self.kl += (p.sum(dim=1) / z - z.log()).sum(dtype=torch.float64).item()
        best = torch.from_numpy(rows["best"].copy()).to(segment.log_probs.device)
        self.agreed += int((segment.log_probs.argmax(dim=1) == best).sum())
        self.tokens += len(rows)

    def close(self) -> None:
        self._file.close()

    @property
    def mean(self) -> float:
        """Nats per token; the rounding of equal models may leave a trace below zero, which is cut off."""
        return max(0.0, self.kl / self.tokens)

    @property
    def agreement(self) -> float:
        """0 to 1."""
        return self.agreed / self.tokens


def write_reference(
    model: nn.Module, passage: Passage, path: Path, *, cancel: CancelToken, check: Callable[[], None] = no_check
) -> Generator[Step, None, Perplexity]:
    """Write what `model`, the original, predicts to `path`, which is there only when it is whole; returns its perplexity.

    Raises:
        DiskFull, CorruptModel, Cancelled.
    """
    total, unfinished = Perplexity(), path.with_name(path.name + ".part")
    with closing(Reference(unfinished, passage, _vocabulary(model))) as reference:
        yield from score(model, passage, [total, reference], cancel=cancel, check=check)
    unfinished.replace(path)
    return total


def divergence(
    model: nn.Module, passage: Passage, path: Path, *, cancel: CancelToken, check: Callable[[], None] = no_check
) -> Generator[Step, None, tuple[Perplexity, Divergence]]:
    """Compare `model` with the original that wrote `path`, over the same windows of the same text.

    Raises:
        BadInput, CorruptModel, Cancelled.
    """
    total = Perplexity()
    with closing(Divergence(path, passage, _vocabulary(model))) as compared:
        yield from score(model, passage, [total, compared], cancel=cancel, check=check)
    return total, compared


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _row_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype([("codes", "<u2", (vocabulary,)), ("best", "<i4")])


def _decoded(codes: Any, device: torch.device) -> Tensor:
    """uint16 codes [rows, vocab] -> log-probabilities in fp32, normalised but for the rounding."""
    return torch.from_numpy(codes.astype(np.float32)).to(device).mul_(-1 / STEPS_PER_NAT)
