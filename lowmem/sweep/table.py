"""The table of a sweep on disk, rewritten after every cell so that an interrupted sweep can continue.

    FOLDER/results.json    rows, and the conditions under which they are comparable
    FOLDER/results.csv     the same rows as CSV
    FOLDER/work/           predictions of references and unfinished checkpoints, deleted at the end

Rows are identified by model and variant. The next run tries failed ones again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem.datasets.texts import Text
from lowmem.errors import BadInput, LowMemError
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.messages import msg
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.foreign import build
from lowmem.settings import settings
from lowmem.sweep.grid import Cell, Grid
from lowmem.version import __version__

RESULTS, TABLE, WORK, LOCK = "results.json", "results.csv", "work", "lock"


class Table:
    """The rows of a sweep in `folder`; created by `opened`."""

    def __init__(self, folder: Path, conditions: dict[str, Any], text: Text) -> None:
        self.folder, self.conditions, self.text = folder, conditions, text
        self._rows = {(row.model, row.variant): row for row in _read(folder, conditions)}

    def row(self, cell: Cell) -> Row | None:
        """The row of a cell; None if it is missing or failed."""
        row = self._rows.get((cell.model, cell.variant.name))
        return row if row and not row.error else None

    def add(self, row: Row) -> None:
        """Add or replace a row, and write the table.

        Raises:
            BadInput: the folder cannot be written.
        """
        self._rows[row.model, row.variant] = row
        content = {"conditions": self.conditions, "rows": [asdict(one) for one in self._rows.values()]}
        write_atomically(self.folder / RESULTS, json.dumps(content, indent=1))
        write_atomically(self.folder / TABLE, to_csv(list(self._rows.values())))

    def work(self, model: str) -> Path:
        """The working folder of a model's cells, with the evaluation text."""
        folder = self.folder / WORK / _slug(model)
        folder.mkdir(parents=True, exist_ok=True)
        if not (path := folder / "text.txt").exists():  # cells may be reading it
            write_atomically(path, self.text.text)
        return folder

    def clear(self, model: str) -> None:
        """Delete a finished model's working folder."""
        shutil.rmtree(self.folder / WORK / _slug(model), ignore_errors=True)

    def finish(self) -> None:
        shutil.rmtree(self.folder / WORK, ignore_errors=True)


@contextmanager
def opened(folder: Path, grid: Grid, text: Text) -> Iterator[Table]:
    """Open the table in `folder` for this process alone.

    Raises:
        BadInput: the folder cannot be created, is in use, or has rows of other conditions.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(
            msg("Another sweep is running in {folder}.", folder=folder), msg("Wait for it, or choose another folder.")
        ) from None
    except OSError as error:
        raise BadInput(
            msg("{folder} cannot be created: {strerror}.", folder=folder, strerror=error.strerror),
            msg("Choose a writable folder."),
        ) from None
    try:
        yield Table(folder, conditions(grid, text), text)
    finally:
        lock.release()


def default_folder(grid: Grid, text: Text) -> Path:
    """The default folder of a grid's table; equal grids have equal folders."""
    what = [conditions(grid, text), [cell.name for cell in grid.cells()]]
    return settings().outputs / f"sweep-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"


def conditions(grid: Grid, text: Text) -> dict[str, Any]:
    """Everything that must be equal for rows to be comparable."""
    return {
        "version": __version__,
        "text": text.name,
        "text_hash": hashlib.sha256(text.text.encode()).hexdigest(),
        "reference": grid.reference.name,
        **asdict(grid.options),
    }


def ordered(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
    """Rows in the order of the grid."""
    place = {(cell.model, cell.variant.name): index for index, cell in enumerate(cells)}
    return sorted(rows, key=lambda row: place.get((row.model, row.variant), len(place)))


@dataclass(frozen=True)
class _Content:
    """The file `RESULTS`."""

    conditions: dict[str, Any]
    rows: list[Row]


def _read(folder: Path, conditions: dict[str, Any]) -> list[Row]:
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        content = build(_Content, read_object(LocalFolder(folder), RESULTS), RESULTS)
    except (OSError, LowMemError):
        raise BadInput(msg("{path} is not the table of a sweep.", path=path), msg("Choose another folder.")) from None
    if content.conditions != conditions:
        raise BadInput(
            msg("{folder} has rows that were measured under other conditions.", folder=folder),
            msg("Choose another folder."),
        )
    return content.rows


def _slug(model: str) -> str:
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-40:] or "model"
    return f"{short}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
