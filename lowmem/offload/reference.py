"""Offloading as accelerate does it, to compare with: hooks that fetch each tensor when its module runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem.errors import DiskFull, Unsupported
from lowmem.machine.hardware import disk_free_bytes
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.planning.estimate import compute_dtype
from lowmem.planning.placement import block_index
from lowmem.planning.plan import Plan
from lowmem.runtime.loader import Loaded
from lowmem.settings import settings
from lowmem.units import format_bytes

_PLACES = {"disk": "disk", "ram": "cpu"}


def device_map(plan: Plan, parameters: Iterable[str]) -> dict[str, str]:
    """accelerate's `device_map` for the plan's placement: one entry a block, one for each module outside of them."""
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


def load(plan: Plan, folder: Path) -> Loaded:
    """The model as `from_pretrained(device_map=...)` loads it, with the plan's placement.

    Raises:
        DiskFull: there is no room for the copies that it makes of weights which are not in safetensors files already.
        Unsupported: the checkpoint is quantized.
    """
    if plan.spec.quantization:
        raise Unsupported(
            "accelerate's disk map does not run quantized checkpoints.", "Compare with the original model."
        )
    dtype = TORCH_DTYPES[compute_dtype(plan.precision, plan.place.dtypes)]
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=True):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Modules with nothing but buffers, such as rotary frequencies, want a place too.
    names = [name for name, _ in (*empty.named_parameters(remove_duplicate=False), *empty.named_buffers())]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map(plan, names),
        offload_folder=str(_spill(plan, dtype)),
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Loaded(model.eval().requires_grad_(False), tokenizer, torch.device(plan.device), dtype)


def _spill(plan: Plan, dtype: torch.dtype) -> Path:
    """A folder for what accelerate writes: weights in another dtype than the files hold."""
    folder = settings().home / "spill"
    needed = plan.spec.parameters * dtype.itemsize
    free = disk_free_bytes(folder)
    if free < needed:
        raise DiskFull(
            f"accelerate may write {format_bytes(needed)} to disk, where {format_bytes(free)} are free.",
            "Make room, or compare with a smaller model.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))
