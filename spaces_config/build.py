"""Put a Space together: python -m spaces_config.build TARGET [--out FOLDER]

The folder is ready to push: README.md with its front matter, requirements.txt, app.py and the package. Nothing of it
is linked to this checkout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spaces_config import front_matter

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
COPIED = ("app.py", "LICENSE", "lowmem")
BY_THE_SPACE = ("gradio",)
"""Installed as `sdk_version` says; a second word on it in requirements.txt would be one too many."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of Space: requirements that take the place of the checkout's, and lines that come first."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


TARGETS = {
    # Without a GPU the build for CPUs saves 4 GB of an image that is loaded at every start.
    "cpu-basic": Target(("torch>=2.8,<2.14",), ("--extra-index-url https://download.pytorch.org/whl/cpu",)),
    # ZeroGPU stands in for CUDA in these versions of torch only.
    "zerogpu": Target(("torch>=2.8,<=2.11.0", "spaces>=0.51")),
}


def build(target: str, out: Path) -> Path:
    """Assemble `target` in the new or empty folder `out`, and return it.

    Raises:
        ValueError: `out` is not empty, or the front matter has a problem.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder.")
    readme = (HERE / f"{target}.md").read_text(encoding="utf-8")
    if wrong := front_matter.problems(front_matter.parse(readme)):
        raise ValueError(" ".join(wrong))
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme, encoding="utf-8")
    (out / "requirements.txt").write_text("\n".join(requirements(target)) + "\n", encoding="utf-8")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(ROOT / name, out / name)
    return out


def requirements(target: str) -> list[str]:
    """The lines of its requirements.txt: the checkout's, but for what the Space brings or the target says otherwise."""
    chosen = TARGETS[target]
    told = {_name(line) for line in chosen.requirements} | set(BY_THE_SPACE)
    kept = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    return [*chosen.options, *chosen.requirements, *(line for line in kept if _name(line) not in told)]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the flags and build; 2 for what cannot be built."""
    parser = argparse.ArgumentParser(prog="spaces_config.build", description="Put a Space together, ready to push.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (space-TARGET)")
    args = parser.parse_args(arguments)
    try:
        out = build(args.target, args.out or Path(f"space-{args.target}"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out} is ready: make a Space of it with `hf upload YOUR_NAME/lowmem {out} . --repo-type space`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
