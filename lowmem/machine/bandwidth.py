"""Bandwidth of this machine: of its disks, its RAM, and the bus to its GPUs.

Measured once, saved in LOWMEM_HOME, and measured again on demand. A disk is measured by reading an existing file past the
page cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowmem.machine import figures as saved_figures
from lowmem.machine import processor
from lowmem.settings import settings
from lowmem.units import MB

log = logging.getLogger("lowmem.machine")

FIGURES = "bandwidth.json"

SECONDS = 2.0
"""Long enough for a cloud disk to use up its burst credit, short enough to wait for."""

PROBE_SECONDS = 0.3
"""For everything but disks; longer runs give no steadier figure."""

CHUNK_BYTES = 4 << 20
BUFFER_CHUNKS = 16
READERS = 2

PROBE_BYTES = 64 * MB
INPUTS = 4096
"""Default number of inputs of the weight matrix in the RAM measurement."""


class Unmeasured(LookupError):
    """The figure was never measured on this machine, and the caller did not allow measuring it."""


Again = bool | None
"""True measures again, False only what was never measured; None never measures and raises `Unmeasured`."""


def disk_bandwidth(file: Path, again: Again = False) -> float:
    """Bytes per second of sequential reads from the disk of `file`; takes about 2 s the first time.

    Reads `file` and writes nothing. 0.0 if the file is empty or unreadable. A file smaller than one read is not
    representative and has a figure of its own.
    """
    found = file.stat()
    key = f"disk {found.st_dev}" + (f" with {found.st_size} bytes" if found.st_size < CHUNK_BYTES else "")
    return _kept(key, again, lambda: _measure_disk(file))


def ram_bandwidth(again: Again = False, inputs: int = INPUTS) -> float:
    """Bytes per second of fp32 weights in RAM that this process multiplies by one row.

    Args:
        inputs: columns of the weight matrix, a power of two; narrow matrices are slower per byte.
    """
    return kept(f"ram {inputs} inputs", again, lambda: _measure_product("cpu", "float32", inputs))


def vram_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second of fp16 weights in its memory that the GPU `device` multiplies by one row."""
    return _kept(f"vram {device}", again, lambda: _measure_product(device, "float16", INPUTS))


def bus_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second from pinned RAM to the GPU `device`."""
    return _kept(f"bus {device}", again, lambda: _measure_bus(device))


def kept(key: str, again: Again, measure: Callable[[], float]) -> float:
    """The figure `key` of this machine for the current number of threads, measured if it is missing or `again`."""
    return _kept(f"{key} {_threads()} threads", again, measure)


def _kept(key: str, again: Again, measure: Callable[[], float]) -> float:
    figures = _figures()
    if not again and figures.get(key):
        return figures[key]
    if again is None:
        raise Unmeasured(key)
    try:
        measured = measure()
    except OSError as error:
        log.warning("%s could not be measured: %s", key, error)
        return 0.0
    if measured:
        saved_figures.save(FIGURES, {**_figures(), key: measured})
    return measured


def _measure_disk(file: Path) -> float:
    from lowmem.machine.direct_io import (
        PAGE,
        Shard,  # the same reads, into the same kind of buffer, as the run that is predicted
        page_aligned,
    )
    from lowmem.models.checkpoint import as_bytes

    size = file.stat().st_size
    chunk = min(CHUNK_BYTES, size // PAGE * PAGE)
    if not chunk:
        return 0.0
    size -= size % chunk
    shard, buffer = Shard(file), as_bytes(page_aligned(BUFFER_CHUNKS * chunk))
    for page in range(0, len(buffer), PAGE):
        buffer[page] = 0  # touch every page: allocating it is not part of the disk's time
    offsets, deadline = iter(range(0, 1 << 62, chunk)), time.perf_counter() + SECONDS

    def work(_: int) -> int:
        read = 0
        while time.perf_counter() < deadline:
            # `next` on a range is atomic: two readers never take the same chunk.
            offset = next(offsets)
            place = offset % len(buffer)
            shard.read(offset % size, buffer[place : place + chunk], chunk)
            read += chunk
        return read

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(READERS) as readers:
            total = sum(readers.map(work, range(READERS)))
        return total / (time.perf_counter() - started)
    finally:
        shard.close()


def _measure_product(device: str, dtype: str, inputs: int) -> float:
    import torch

    kind = getattr(torch, dtype)
    outputs = PROBE_BYTES // kind.itemsize // inputs
    weight, row = (torch.zeros(count, inputs, dtype=kind, device=device) for count in (outputs, 1))

    def multiply() -> None:
        torch.nn.functional.linear(row, weight)
        if device != "cpu":
            torch.cuda.synchronize(device)

    return rate(multiply, weight.nbytes)


def _measure_bus(device: str) -> float:
    import torch

    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return rate(copy, PROBE_BYTES)


def rate(action: Callable[[], Any], nbytes: int) -> float:
    """Bytes per second of an action on `nbytes`: the median of at least three runs within `PROBE_SECONDS`."""
    action()
    runs: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    while len(runs) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        action()
        runs.append(time.perf_counter() - started)
    return nbytes / sorted(runs)[len(runs) // 2]


def _threads() -> str:
    # What torch will use. Saved figures are looked up on every move of a slider, long before torch is imported.
    return settings().threads or str(processor.cores())


def _figures() -> dict[str, float]:
    return saved_figures.figures(FIGURES)
