"""How fast this machine moves bytes: from its disks, from RAM, over the bus to a GPU.

Measured once for each disk and for each version of torch, kept in LOWMEM_HOME, measured again on demand. Knows nothing of
models; a disk is measured by reading a file that is there, past the page cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowmem.machine import figures as kept_figures
from lowmem.machine import processor
from lowmem.settings import settings
from lowmem.units import MB

log = logging.getLogger("lowmem.machine")

FIGURES = "bandwidth.json"

SECONDS = 2.0
"""Long enough for a disk to leave its burst of credit behind, short enough to wait for."""

PROBE_SECONDS = 0.3
"""Of everything else, which needs no more to be steady."""

CHUNK_BYTES = 4 << 20
BUFFER_CHUNKS = 16
READERS = 2

PROBE_BYTES = 64 * MB
INPUTS = 4096
"""Of the weights that a row is multiplied by, where nobody says how many."""


class Unmeasured(LookupError):
    """A figure that was never measured here, where only known ones were asked for."""


Again = bool | None
"""True measures anew, False what was never measured; None measures nothing and raises `Unmeasured`."""


def disk_bandwidth(file: Path, again: Again = False) -> float:
    """Bytes per second of sequential reads on the disk where `file` lies, about 2 s the first time.

    Reads `file` itself: nothing is written. 0.0 when the file is empty or cannot be read. A file that is smaller than
    one read says nothing of others, and has a figure of its own.
    """
    found = file.stat()
    key = f"disk {found.st_dev}" + (f" with {found.st_size} bytes" if found.st_size < CHUNK_BYTES else "")
    return _kept(key, again, lambda: _measure_disk(file))


def ram_bandwidth(again: Again = False, inputs: int = INPUTS) -> float:
    """Bytes per second at which this process multiplies a row by fp32 weights that lie in RAM.

    Args:
        inputs: of the weights, as a power of two: few take longer.
    """
    return kept(f"ram {inputs} inputs", again, lambda: _measure_product("cpu", "float32", inputs))


def vram_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second at which the GPU `device` multiplies a row by fp16 weights that lie in its memory."""
    return _kept(f"vram {device}", again, lambda: _measure_product(device, "float16", INPUTS))


def bus_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second from pinned RAM to the GPU `device`."""
    return _kept(f"bus {device}", again, lambda: _measure_bus(device))


def kept(key: str, again: Again, measure: Callable[[], float]) -> float:
    """A figure of this machine by name: measured now if it never was, or `again`."""
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
        kept_figures.keep(FIGURES, {**_figures(), key: measured})
    return measured


def _measure_disk(file: Path) -> float:
    from lowmem.machine.direct_io import (
        PAGE,
        Shard,  # the same reads, into the same kind of buffer, as those that are predicted
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
        buffer[page] = 0  # the system hands pages out on the first touch, which is no part of a disk
    offsets, deadline = iter(range(0, 1 << 62, chunk)), time.perf_counter() + SECONDS

    def work(_: int) -> int:
        read = 0
        while time.perf_counter() < deadline:
            # Counting up is atomic; two readers never take the same chunk.
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
    """Bytes per second of an action on `nbytes`: the median of the runs in `PROBE_SECONDS`, at least three."""
    action()
    runs: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    while len(runs) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        action()
        runs.append(time.perf_counter() - started)
    return nbytes / sorted(runs)[len(runs) // 2]


def _threads() -> str:
    # What torch will go by; known figures are asked for on every move of a slider, long before anybody needs torch.
    return settings().threads or str(processor.cores())


def _figures() -> dict[str, float]:
    return kept_figures.figures(FIGURES)
