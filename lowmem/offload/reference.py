"""Offloading with accelerate as a reference: hooks load each tensor when its module runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem.errors import DiskFull, Unsupported
from lowmem.events import CancelToken, Chunk, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import encode_prompt
from lowmem.generate.text import stream
from lowmem.machine.hardware import disk_free_bytes
from lowmem.machine.monitor import PeakMeter
from lowmem.messages import msg
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.fetch import fetch
from lowmem.models.modules import empty_model
from lowmem.planning.model_bytes import compute_dtype
from lowmem.planning.placement import block_index
from lowmem.planning.plan import Plan
from lowmem.runtime.loader import Loaded
from lowmem.settings import settings
from lowmem.units import format_bytes

_PLACES = {"disk": "disk", "ram": "cpu"}


def device_map(plan: Plan, parameters: Iterable[str]) -> dict[str, str]:
    """accelerate's `device_map` for the plan's placement: one entry per block and per module outside of blocks."""
    found: dict[str, str] = {}
    for name in parameters:
        index = block_index(name)
        if index is None or plan.placement is None:
            found[name.rpartition(".")[0]] = plan.device
            continue
        parts = name.split(".")
        block = ".".join(parts[: parts.index(str(index)) + 1])
        found[block] = _PLACES.get(plan.placement.blocks[index], plan.device)
    return found


def run(plan: Plan, prompt: str, options: GenerateOptions) -> Generator[Step, None, Receipt]:
    """Continue `prompt`; the return value of the generator is the receipt.

    Raises:
        DiskFull, Unsupported: see `loaded`.
    """
    folder = yield from fetch(plan.spec, CancelToken())
    yield Step(0, 0, msg("Loading with accelerate"))
    started, before = time.perf_counter(), _read_bytes()
    last: Chunk = Chunk("")
    with PeakMeter() as meter, loaded(plan, folder) as ready:
        ids, model = encode_prompt(ready.tokenizer, prompt, True), ready.model
        for event in stream(model, ready.tokenizer, ids, options, context=plan.spec.context, cancel=CancelToken()):
            if isinstance(event, Chunk):
                last = event
                yield Step(event.new_tokens, options.max_new_tokens, msg("Decoding"), "tokens")
    return Receipt(
        action="offload",
        model=plan.spec.name,
        precision=plan.precision,
        device=plan.device,
        seconds=time.perf_counter() - started,
        measured=meter.peak,
        prompt_tokens=last.prompt_tokens,
        new_tokens=last.new_tokens,
        decode_tps=last.decode_tps,
        details={
            "placement": plan.placement.sentence() if plan.placement else "",
            "seconds_per_token": 1 / last.decode_tps if last.decode_tps else 0.0,
            "bytes_read": max(0, _read_bytes() - before),
            "method": "accelerate",
        },
    )


def _read_bytes() -> int:
    """Bytes that this process has read from disk (Linux only, else 0)."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


@contextmanager
def loaded(plan: Plan, folder: Path) -> Iterator[Loaded]:
    """The model loaded by `from_pretrained(device_map=...)` with the plan's placement.

    Raises:
        DiskFull: no room for the copies that accelerate writes of weights whose stored dtype differs from the computed one.
        Unsupported: the checkpoint is quantized.
    """
    if plan.spec.quantization:
        raise Unsupported(
            msg("accelerate cannot offload quantized checkpoints to disk."), msg("Compare with the original model.")
        )
    dtype = TORCH_DTYPES[compute_dtype(plan.precision, plan.place.dtypes)]
    with _spill(plan, dtype) as spill:
        yield _load(plan, folder, dtype, spill)


def _load(plan: Plan, folder: Path, dtype: torch.dtype, spill: Path) -> Loaded:
    empty = empty_model(folder)
    # Modules that have only buffers, such as rotary frequencies, also need an entry.
    names = [name for name, _ in (*empty.named_parameters(remove_duplicate=False), *empty.named_buffers())]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map(plan, names),
        offload_folder=str(spill),
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Loaded(model.eval().requires_grad_(False), tokenizer, torch.device(plan.device), dtype)


@contextmanager
def _spill(plan: Plan, dtype: torch.dtype) -> Iterator[Path]:
    """A temporary folder for the weights that accelerate writes in another dtype than the stored one."""
    root = settings().home / "spill"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob("*-*"):
        owner = left.name.split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    needed, free = plan.spec.parameters * dtype.itemsize, disk_free_bytes(root)
    if free < needed:
        raise DiskFull(
            msg(
                "accelerate may write {needed} to disk, but only {free} is free.",
                needed=format_bytes(needed),
                free=format_bytes(free),
            ),
            msg("Free up space, or compare with a smaller model."),
        )
    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=root, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
