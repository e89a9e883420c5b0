"""RAM that torch and transformers take before any model is loaded, measured once per version."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import platform
import subprocess
import sys
from pathlib import Path

from lowmem.machine import figures as saved_figures
from lowmem.settings import child_environment

log = logging.getLogger("lowmem.machine")

FIGURES = "runtime_bytes.json"

# Measured with torch 2.13 and transformers 5.23 on Linux x86-64; used until this machine is measured.
DEFAULT_RUNTIME_BYTES = 450_000_000

# What a session imports before it reads the first weight. Llama's classes stand for any family's; the
# matrix product makes torch start its threads and its matrix library, as any model would.
_CHILD = """
import psutil
import torch
from lowmem.generate import batching
from lowmem.runtime import loader
from transformers.models.llama.modeling_llama import LlamaForCausalLM
square = torch.ones(512, 512)
square @ square
print(psutil.Process().memory_info().rss)
"""


_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def runtime_bytes() -> int:
    """Bytes for the installed versions; `DEFAULT_RUNTIME_BYTES` before the first measurement."""
    return _measured().get(_versions(), DEFAULT_RUNTIME_BYTES)


def measure_runtime_bytes() -> int:
    """Measure in a child process (about 4 s) unless these versions were measured before; save it in LOWMEM_HOME.

    Without a working torch, returns the default and saves nothing.
    """
    if cached := _measured().get(_versions()):
        return cached
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=180, check=True, cwd=_PACKAGE_PARENT,
            env=child_environment(),
        )  # fmt: skip
        measured = int(child.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("the runtime's RAM could not be measured: %s", error)
        return DEFAULT_RUNTIME_BYTES
    saved_figures.save(FIGURES, _versions(), measured)
    return measured


def _measured() -> dict[str, int]:
    return {versions: int(count) for versions, count in saved_figures.figures(FIGURES).items()}


@functools.cache
def _versions() -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    return f"torch {version('torch')}, transformers {version('transformers')}, python {platform.python_version()}"
