"""One row of a comparison, and the table of rows as CSV. Imports no torch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lowmem.errors import BadInput
from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one variant; None if not measured.

    Args:
        variant: its name, see `Variant`.
        error: why there are no measurements, or "".
        bits_per_parameter: 8 * `weight_bytes` / parameters: of all weights as loaded, embeddings included.
        bits_per_quantized_weight: of a quantization, of the quantized weights alone, with scales and zero points.
        weight_bytes: size of the loaded weights.
        disk_bytes: size of the weight files; precisions are converted from the original files while loading.
        perplexity: on the evaluation text.
        perplexity_change: relative to the reference; 0.02 is 2 % worse.
        kl: mean KL divergence of the reference's next-token distribution from the variant's, nats per token.
        agreement: share of tokens with the same most likely next token, 0 to 1.
        prefill_tps, decode_tps: tokens per second, medians.
        ram_bytes, vram_bytes: measured peak of the process.
        predicted_ram_bytes, predicted_vram_bytes: estimated before loading.
        seconds: duration of the process, including quantization.
        quantize_seconds, quantize_ram_bytes: duration and peak RAM of quantization, in a child process.
        model: the model's name as requested.
    """

    variant: str
    error: str = ""
    bits_per_parameter: float | None = None
    bits_per_quantized_weight: float | None = None
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
        """Measured peak of the GPU's memory if one was used, else of RAM."""
        return self.vram_bytes if self.predicted_vram_bytes is not None else self.ram_bytes

    @property
    def predicted_bytes(self) -> int | None:
        """Predicted peak of the same memory."""
        return self.predicted_vram_bytes if self.predicted_vram_bytes is not None else self.predicted_ram_bytes

    @property
    def prediction_error(self) -> float | None:
        """(predicted - measured) / measured."""
        if not self.peak_bytes or self.predicted_bytes is None:
            return None
        return (self.predicted_bytes - self.peak_bytes) / self.peak_bytes

    @property
    def above_prediction(self) -> float | None:
        """measured / predicted - 1: positive where the peak was above its prediction."""
        if not self.peak_bytes or not self.predicted_bytes:
            return None
        return self.peak_bytes / self.predicted_bytes - 1


def largest_peaks(rows: Sequence[Row]) -> tuple[dict[str, int], dict[str, int]]:
    """Predicted and measured peak bytes by memory ("ram" or "vram") of the row with the largest measured peak."""
    worst = max(rows, key=lambda row: row.peak_bytes or 0)
    memory = "ram" if worst.predicted_vram_bytes is None else "vram"
    predicted, measured = worst.predicted_bytes, worst.peak_bytes
    return {memory: predicted} if predicted else {}, {memory: measured} if measured else {}


def to_csv(rows: Sequence[Row]) -> str:
    """A header and one line per row; bytes and seconds as plain numbers, empty if not measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(field.name for field in fields(Row)), "prediction_error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "prediction_error": row.prediction_error} for row in rows)
    return out.getvalue()


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file that appears under its name only once it is complete.

    Raises:
        BadInput: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise BadInput(
            msg("{path} cannot be written: {strerror}.", path=path, strerror=error.strerror),
            msg("Choose a path in an existing folder."),
        ) from None
    return path
