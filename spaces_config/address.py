"""Say once where this repository lives: python -m spaces_config.address NAME/REPOSITORY

The badge in docs/hosting.md opens the notebook from there, and the notebook installs lowmem from there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = r"[\w-]+/[\w.-]+"
PLACES = {
    "docs/hosting.md": rf"(?<=/github/){ADDRESS}(?=/blob/main/spaces_config/colab\.ipynb)",
    "spaces_config/colab.ipynb": rf"(?<=https://github\.com/){ADDRESS}(?=\\\")",
}
"""File -> where the address stands in it."""


def addresses(root: Path = ROOT) -> set[str]:
    """What the files say now: one address, or they disagree."""
    return {found for name, place in PLACES.items() for found in re.findall(place, (root / name).read_text("utf-8"))}


def settle(address: str, root: Path = ROOT) -> None:
    """Write `address` ("name/repository" on GitHub) into all of them."""
    for name, place in PLACES.items():
        text = (root / name).read_text("utf-8")
        (root / name).write_text(re.sub(place, address, text), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the address and write it; 2 for what is none."""
    parser = argparse.ArgumentParser(prog="spaces_config.address", description="Say where this repository lives.")
    parser.add_argument("address", metavar="NAME/REPOSITORY", help="as it stands behind https://github.com/")
    address = parser.parse_args(arguments).address
    if not re.fullmatch(ADDRESS, address):
        print(f"{address!r} is no address; write it like ada/lowmem.", file=sys.stderr)
        return 2
    settle(address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
