"""Compares a model's predictions with those of the original: mean KL divergence and top-1 agreement.

The two models are never in memory together: the original's log-probabilities are written to a file, and the other model
is compared with the file token by token. The file stores -log p from 0 to 32 nats as 16-bit multiples of 2^-11 nats,
which takes 2 bytes per token and vocabulary entry (llama.cpp's `--kl-divergence-base` does the same with a scale per
token). Rounding changes a log-probability by at most 2^-12 nats, and each row is normalised again when read, so equal
models diverge by less than 1e-7. Otherwise the error is below 5e-4 times the mean of |log p - log q|, usually far below.
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
from lowmem.generate.decoding import decoder_config, no_check
from lowmem.measure.perplexity import Perplexity
from lowmem.measure.scoring import Segment, score
from lowmem.measure.windows import Passage
from lowmem.messages import msg
from lowmem.units import format_bytes

STEPS_PER_NAT = 2048
_LARGEST_CODE = 2**16 - 1

_LESS_TEXT = msg("Free up space, or measure fewer tokens.")


def reference_bytes(tokens: int, vocabulary: int) -> int:
    """Size of the file of log-probabilities for `tokens` scored tokens."""
    return tokens * (2 * vocabulary + 4)


class Reference:
    """Writes the original's log-probabilities: a header line, then per token the codes and the most likely token.

    Raises:
        DiskFull: before anything is written if the file cannot fit, else when the disk runs full.
    """

    def __init__(self, path: Path, passage: Passage, vocabulary: int) -> None:
        needed, free = reference_bytes(passage.scored, vocabulary), shutil.disk_usage(path.parent).free
        if needed > free:
            raise DiskFull(
                msg(
                    "The reference's predictions take {needed}, but only {free} of disk space is free.",
                    needed=format_bytes(needed),
                    free=format_bytes(free),
                ),
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
            raise DiskFull(msg("The disk ran full while writing the reference's predictions."), _LESS_TEXT) from error

    def close(self) -> None:
        self._file.close()


class Divergence:
    """A running comparison of a model with the file that `Reference` wrote.

    `kl` is the sum of KL(original || model) in nats over `tokens` tokens; `agreed` counts those with the same most
    likely next token.

    Raises:
        BadInput: the file is for another text, other windows or another vocabulary.
    """

    def __init__(self, path: Path, passage: Passage, vocabulary: int) -> None:
        self.kl, self.agreed, self.tokens = 0.0, 0, 0
        self._file = path.open("rb")
        header = json.loads(self._file.readline())
        if header["vocabulary"] != vocabulary:
            self.close()
            raise BadInput(
                msg(
                    "The model's vocabulary has {vocabulary:,} tokens, but the reference's has {reference:,}.",
                    vocabulary=vocabulary,
                    reference=header["vocabulary"],
                ),
                msg("Compare variants of the same model."),
            )
        if header["identity"] != passage.identity:
            self.close()
            raise BadInput(
                msg("The model's tokenizer splits the text differently from the reference's."),
                msg("Compare variants of the same model."),
            )
        self._row = _row_type(vocabulary)

    def add(self, segment: Segment) -> None:
        rows = np.frombuffer(self._file.read(len(segment.targets) * self._row.itemsize), self._row)
        # In place, because each of these is as large as the logits. With P = p / Z the divergence is
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
        """Nats per token, at least 0 (rounding could make it slightly negative for equal models)."""
        return max(0.0, self.kl / self.tokens)

    @property
    def agreement(self) -> float:
        """Share of tokens with the same most likely next token, 0 to 1."""
        return self.agreed / self.tokens


def write_reference(
    model: nn.Module, passage: Passage, path: Path, *, cancel: CancelToken
) -> Generator[Step, None, Perplexity]:
    """Write the predictions of `model`, the original, to `path` once they are complete; returns its perplexity.

    Raises:
        DiskFull, CorruptModel, Cancelled.
    """
    total, unfinished = Perplexity(), path.with_name(path.name + ".part")
    with closing(Reference(unfinished, passage, decoder_config(model).vocab_size)) as reference:
        yield from score(model, passage, [total, reference], cancel=cancel)
    unfinished.replace(path)
    return total


def divergence(
    model: nn.Module,
    passage: Passage,
    path: Path,
    *,
    cancel: CancelToken,
    check: Callable[[], None] = no_check,
) -> Generator[Step, None, tuple[Perplexity, Divergence]]:
    """Compare `model` with the predictions in `path`, over the same windows of the same text.

    Raises:
        BadInput, CorruptModel, Cancelled.
    """
    total = Perplexity()
    with closing(Divergence(path, passage, decoder_config(model).vocab_size)) as compared:
        yield from score(model, passage, [total, compared], cancel=cancel, check=check)
    return total, compared


def _row_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype([("codes", "<u2", (vocabulary,)), ("best", "<i4")])


def _decoded(codes: Any, device: torch.device) -> Tensor:
    """fp32 log-probabilities from uint16 codes [rows, vocab], normalised up to rounding."""
    return torch.from_numpy(codes.astype(np.float32)).to(device).mul_(-1 / STEPS_PER_NAT)
