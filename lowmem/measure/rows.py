"""One line of a comparison, and the table of them as CSV. No torch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lowmem.errors import BadInput


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant costs and is worth; None is what could not be measured.

    Args:
        variant: its name, see `Variant`.
        error: why there are no figures, or "".
        bits_per_weight: of all loaded weights, embeddings included: 8 * `weight_bytes` / parameters.
        weight_bytes: loaded weights.
        disk_bytes: weight files the variant is loaded from; precisions are made of the original while loading.
        perplexity: on the text of the comparison.
        perplexity_change: relative to the reference, 0.02 is 2 % worse.
        kl: mean KL divergence of the reference's next-token distribution from the variant's, nats per token.
        agreement: share of tokens with the same most likely next token, 0 to 1.
        prefill_tps, decode_tps: tokens per second, medians.
        ram_bytes, vram_bytes: true peak of the process.
        predicted_ram_bytes, predicted_vram_bytes: what was predicted before loading.
        seconds: of the whole process, making the quantized checkpoint included.
        quantize_seconds, quantize_ram_bytes: of making the checkpoint, in a process before.
        model: what it is a variant of, as it was asked for.
    """

    variant: str
    error: str = ""
    bits_per_weight: float | None = None
    weight_bytes: int | None = None
    disk_bytes: int | None = None
    perplexity: float | None = None
    perplexity_change: float | None = None
    kl: float | None = None
    agreement: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    predicted_ram_bytes: int | None = None
    predicted_vram_bytes: int | None = None
    seconds: float | None = None
    quantize_seconds: float | None = None
    quantize_ram_bytes: int | None = None
    model: str = ""

    @property
    def peak_bytes(self) -> int | None:
        """Peak of the memory that counts: the GPU's where one was used."""
        return self.vram_bytes if self.predicted_vram_bytes is not None else self.ram_bytes

    @property
    def predicted_bytes(self) -> int | None:
        return self.predicted_vram_bytes if self.predicted_vram_bytes is not None else self.predicted_ram_bytes

    @property
    def prediction_error(self) -> float | None:
        """(predicted - measured) / measured."""
        if not self.peak_bytes or self.predicted_bytes is None:
            return None
        return (self.predicted_bytes - self.peak_bytes) / self.peak_bytes


def to_csv(rows: Sequence[Row]) -> str:
    """A header and a line per row; bytes and seconds as plain numbers, nothing where nothing was measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(field.name for field in fields(Row)), "prediction_error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "prediction_error": row.prediction_error} for row in rows)
    return out.getvalue()


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file that is there whole or not at all.

    Raises:
        BadInput: it cannot be written there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}.", "Name a file in a folder that exists.") from None
    return path
