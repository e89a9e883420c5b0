"""A virtual environment that holds what a requirements.txt brings, and nothing else, in a second.

Its packages are links to those of the interpreter that runs the tests: every requirement, what these require, and so
on. lowmem itself is not among them, so a program finds only the copy beside it.
"""

from __future__ import annotations

import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def parse(lines: Iterable[str]) -> list[Requirement]:
    """The requirements of a requirements.txt; options of pip are left out, and what is not for this machine."""
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "-"))]
    return [one for one in wanted if one.marker is None or one.marker.evaluate()]


def closure(wanted: Iterable[Requirement], absent: Iterable[str] = ()) -> dict[str, Distribution]:
    """Every distribution that `wanted` brings, by name.

    Raises:
        PackageNotFoundError: one is not installed here, and none of `absent`. AssertionError: of a version not wanted.
    """
    found: dict[str, Distribution] = {}
    queue = [(one, frozenset(one.extras)) for one in wanted]
    seen = set()
    while queue:
        one, extras = queue.pop()
        name = canonicalize_name(one.name)
        if name in absent:
            continue
        found[name] = installed = distribution(one.name)
        assert one.specifier.contains(installed.version, prereleases=True), f"{one}: {installed.version} is installed"
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in installed.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
                queue.append((needed, frozenset(needed.extras)))
    return found


def make(folder: Path, lines: Iterable[str], absent: Iterable[str] = ()) -> Path:
    """Make the environment in `folder`; returns its Python. `absent` are names that are brought in another way."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for one in closure(parse(lines), absent).values():
        for file in one.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    return folder / "bin" / "python"


__all__ = ["PackageNotFoundError", "closure", "make", "parse"]
