"""The block on top of a Space's README.md: what may stand there, and what is wrong with one.

Keys and values: https://huggingface.co/docs/hub/spaces-config-reference, of August 2026.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
HARDWARE = (
    "cpu-basic", "cpu-upgrade", "t4-small", "t4-medium", "l4x1", "l4x4", "l40sx1", "l40sx4", "l40sx8", "a10g-small",
    "a10g-large", "a10g-largex2", "a10g-largex4", "a100-large", "a100x4", "a100x8",
)  # fmt: skip
ZEROGPU_PYTHONS = ("3.12.12", "3.10.13")

KEYS: dict[str, type | tuple[str, ...]] = {
    "title": str,
    "emoji": str,
    "colorFrom": COLOURS,
    "colorTo": COLOURS,
    "sdk": ("gradio", "docker", "static"),
    "sdk_version": str,
    "python_version": str,
    "app_file": str,
    "app_port": int,
    "base_path": str,
    "fullWidth": bool,
    "header": ("mini", "default"),
    "short_description": str,
    "models": list,
    "datasets": list,
    "tags": list,
    "thumbnail": str,
    "pinned": bool,
    "hf_oauth": bool,
    "hf_oauth_scopes": list,
    "hf_oauth_expiration_minutes": int,
    "disable_embedding": bool,
    "startup_duration_timeout": str,
    "custom_headers": dict,
    "preload_from_hub": list,
    "suggested_hardware": HARDWARE,
    "license": str,
}
REQUIRED = ("title", "sdk", "sdk_version", "python_version", "app_file", "license")
LONGEST_DESCRIPTION = 60


def parse(readme: str) -> dict[str, Any]:
    """The front matter of a README.

    Raises:
        ValueError: there is none, or it is no mapping.
    """
    found = re.match(r"---\n(.*?)\n---\n", readme, flags=re.DOTALL)
    values = yaml.safe_load(found[1]) if found else None
    if not isinstance(values, dict):
        raise ValueError("The README does not begin with a block of keys between two lines of ---.")
    return values


def problems(values: dict[str, Any]) -> list[str]:
    """What the hub would not accept, a sentence each."""
    found = [f"There is no key {key!r}." for key in REQUIRED if key not in values]
    for key, value in values.items():
        allowed = KEYS.get(key)
        if allowed is None:
            found.append(f"The hub knows no key {key!r}.")
        elif isinstance(allowed, tuple) and value not in allowed:
            found.append(f"{key} is {value!r}, and none of {', '.join(allowed)}.")
        elif isinstance(allowed, type) and type(value) is not allowed:
            found.append(f"{key} is {value!r}, which is no {allowed.__name__}.")
    if len(str(values.get("short_description", ""))) > LONGEST_DESCRIPTION:
        found.append(f"short_description is longer than {LONGEST_DESCRIPTION} characters.")
    return found
