"""The table of a sweep as it lies on disk: written as a whole after every cell, so that a killed sweep goes on from it.

    FOLDER/results.json    rows, and the conditions under which they can be compared
    FOLDER/results.csv     the same for people
    FOLDER/work/           predictions of references and unfinished checkpoints, removed at the end

Rows are known by model and variant. Those that failed are tried again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem.datasets.texts import Text
from lowmem.errors import BadInput
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.settings import settings
from lowmem.sweep.grid import Cell, Grid
from lowmem.version import __version__

RESULTS, TABLE, WORK, LOCK = "results.json", "results.csv", "work", "lock"


class Table:
    """Rows of a sweep in `folder`; made by `opened`."""

    def __init__(self, folder: Path, conditions: dict[str, Any], text: Text) -> None:
        self.folder, self.conditions, self.text = folder, conditions, text
        self._rows = {(row.model, row.variant): row for row in _read(folder, conditions)}

    def row(self, cell: Cell) -> Row | None:
        """The finished row of a cell; None when there is none, or it failed."""
        row = self._rows.get((cell.model, cell.variant.name))
        return row if row and not row.error else None

    def add(self, row: Row) -> None:
        """Keep a row.

        Raises:
            BadInput: the folder cannot be written.
        """
        self._rows[row.model, row.variant] = row
        content = {"conditions": self.conditions, "rows": [asdict(one) for one in self._rows.values()]}
        write_atomically(self.folder / RESULTS, json.dumps(content, indent=1))
        write_atomically(self.folder / TABLE, to_csv(list(self._rows.values())))

    def work(self, model: str) -> Path:
        """The folder of a model's cells, with the evaluation text in it."""
        folder = self.folder / WORK / _slug(model)
        folder.mkdir(parents=True, exist_ok=True)
        if not (path := folder / "text.txt").exists():  # cells may be reading it
            write_atomically(path, self.text.text)
        return folder

    def clear(self, model: str) -> None:
        """Remove what a finished model needs no more."""
        shutil.rmtree(self.folder / WORK / _slug(model), ignore_errors=True)

    def finish(self) -> None:
        shutil.rmtree(self.folder / WORK, ignore_errors=True)


@contextmanager
def opened(folder: Path, grid: Grid, text: Text) -> Iterator[Table]:
    """The table in `folder`, for one process at a time.

    Raises:
        BadInput: the folder cannot be made, is in use, or holds rows of other conditions.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"Another sweep is at work in {folder}.", "Wait for it, or name another folder.") from None
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror}.", "Name a folder that can be written.") from None
    try:
        yield Table(folder, conditions(grid, text), text)
    finally:
        lock.release()


def default_folder(grid: Grid, text: Text) -> Path:
    """Where a grid's table is kept unless a folder is named: the same grid finds it again."""
    what = [conditions(grid, text), [cell.name for cell in grid.cells()]]
    return settings().outputs / f"sweep-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def conditions(grid: Grid, text: Text) -> dict[str, Any]:
    """What must be the same for rows to be comparable."""
    return {
        "version": __version__,
        "text": text.name,
        "text_hash": hashlib.sha256(text.text.encode()).hexdigest(),
        "reference": grid.reference.name,
        **asdict(grid.options),
    }


def ordered(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
    """Rows in the order of the grid, whichever finished first."""
    place = {(cell.model, cell.variant.name): index for index, cell in enumerate(cells)}
    return sorted(rows, key=lambda row: place.get((row.model, row.variant), len(place)))


def _read(folder: Path, conditions: dict[str, Any]) -> list[Row]:
    path = folder / RESULTS
    if not path.exists():
        return []
    known = {field.name for field in fields(Row)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["conditions"] == conditions
        rows = [Row(**{key: value for key, value in row.items() if key in known}) for row in content["rows"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise BadInput(f"{path} is not the table of a sweep.", "Name another folder.") from None
    if not same:
        raise BadInput(f"{folder} holds rows that were measured otherwise.", "Name another folder.")
    return rows


def _slug(model: str) -> str:
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-40:] or "model"
    return f"{short}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
