"""Bandwidth of this machine: of its disks, its RAM, and the bus to its GPUs.

Measured once and again on demand, see `rates`. A disk is measured by reading an existing file past the page cache.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from lowmem.machine.direct_io import PAGE, Shard, page_aligned  # reads as the run that is predicted
from lowmem.machine.rates import Again, rate, saved_rate
from lowmem.units import MB

SECONDS = 2.0
"""Long enough for a cloud disk to use up its burst credit, short enough to wait for."""

PATIENCE_SECONDS = 10.0
"""For the last reads; a disk that needs longer is too slow to measure."""

CHUNK_BYTES = 4 << 20
BUFFER_CHUNKS = 16
READERS = 2

PROBE_BYTES = 64 * MB
INPUTS = 4096
"""Default number of inputs of the weight matrix in the RAM measurement."""


def disk_bandwidth(file: Path, again: Again = False) -> float:
    """Bytes per second of sequential reads from the disk of `file`; takes about 2 s the first time.

    Reads `file` beside a busy processor, and writes nothing. 0.0 if the file is empty. A file smaller than one read is not
    representative and has a figure of its own.

    Raises:
        Unmeasured: see `rates.saved_rate`; the disk is too slow to measure.
    """
    found = file.stat()
    key = f"disk {found.st_dev}" + (f" with {found.st_size} bytes" if found.st_size < CHUNK_BYTES else "")
    return saved_rate(key, again, lambda: _measure_disk(file))


def ram_bandwidth(again: Again = False, inputs: int = INPUTS) -> float:
    """Bytes per second of fp32 weights in RAM that this process multiplies by one row.

    Args:
        inputs: columns of the weight matrix, a power of two; narrow matrices are slower per byte.
    """
    return saved_rate(f"ram {inputs} inputs", again, lambda: _measure_product("cpu", "float32", inputs))


def vram_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second of fp16 weights in its memory that the GPU `device` multiplies by one row."""
    return saved_rate(f"vram {device}", again, lambda: _measure_product(device, "float16", INPUTS))


def bus_bandwidth(device: str, again: Again = False) -> float:
    """Bytes per second from pinned RAM to the GPU `device`."""
    return saved_rate(f"bus {device}", again, lambda: _measure_bus(device))


def _measure_disk(file: Path) -> float:
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
    read = [0] * READERS

    def work(reader: int) -> None:
        while time.perf_counter() < deadline:
            # `next` on a range is atomic: two readers never take the same chunk.
            offset = next(offsets)
            place = offset % len(buffer)
            shard.read(offset % size, buffer[place : place + chunk], chunk)
            read[reader] += chunk

    started = time.perf_counter()
    readers = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in range(READERS)]
    for reader in readers:
        reader.start()
    _keep_busy(deadline)
    for reader in readers:
        reader.join(max(0.0, deadline + PATIENCE_SECONDS - time.perf_counter()))
    if any(reader.is_alive() for reader in readers):  # which the file stays open for
        raise TimeoutError(f"{file} is on a disk that reads less than {chunk / PATIENCE_SECONDS / MB:.1f} MB/s")
    shard.close()
    return sum(read) / (time.perf_counter() - started)


def _keep_busy(deadline: float) -> None:
    """Multiply until `deadline`, as the run whose blocks are read does."""
    import torch

    weight, row = torch.zeros(INPUTS, INPUTS), torch.zeros(1, INPUTS)
    while time.perf_counter() < deadline:
        torch.nn.functional.linear(row, weight)


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
