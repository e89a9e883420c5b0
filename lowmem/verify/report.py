"""The report of a verification: one JSON object with machine, versions, plan and figures. Imports no torch."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem.measure.rows import write_atomically
from lowmem.planning.plan import Plan
from lowmem.verify.claims import FAILED, Claim
from lowmem.version import __version__

PACKAGES = ("torch", "transformers", "onnxruntime", "safetensors", "tokenizers", "numpy", "bitsandbytes", "gradio")


def report(plan: Plan, claims: Sequence[Claim], seconds: float) -> dict[str, Any]:
    """JSON-ready; bytes and seconds as plain numbers."""
    source = plan.spec.source
    return {
        "passed": all(claim.verdict != FAILED for claim in claims),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": seconds,
        "model": {
            "name": plan.spec.name,
            "reference": plan.spec.ref,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
        },
        "plan": _plan(plan),
        "claims": [asdict(claim) | {"error": claim.error} for claim in claims],
        "machine": _machine(plan),
        "versions": {"lowmem": __version__, "python": platform.python_version(), **_versions()},
    }


def write_report(content: dict[str, Any], path: Path) -> Path:
    """Write a report as indented JSON; the file appears once it is complete.

    Raises:
        BadInput: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, json.dumps(content, indent=1) + "\n")


def _plan(plan: Plan) -> dict[str, Any]:
    names = ("precision", "device", "backend", "context", "batch", "cache_type", "prefill_chunk", "verdict", "reason")
    placement = asdict(plan.placement) if plan.placement else None
    return {
        **{name: getattr(plan, name) for name in names},
        "placement": placement,
        "budget": plan.budget.as_dict(),
        "predicted": plan.predicted,
    }


def _machine(plan: Plan) -> dict[str, Any]:
    hardware = plan.hardware
    found = asdict(hardware)
    del found["disk_path"]  # names the user
    return {"line": hardware.line(), "system": platform.platform(), **found}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
