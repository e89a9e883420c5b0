"""The journal of an unfinished quantization: its request and its progress.

It is replaced atomically after every block, once the block's bytes are on disk: the folder may hold more than the journal
says, never less.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem.errors import BadInput, CorruptModel
from lowmem.messages import join, msg
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.foreign import build

JOURNAL = "journal.json"
_LOCK, _DRAFT = "lock", f"{JOURNAL}.new"


@dataclass
class Shard:
    """An unfinished weight file: the entries of its header so far, and where its next tensor begins."""

    entries: dict[str, Any]
    position: int


@dataclass
class Journal:
    """Progress of one quantization.

    Args:
        settings: what the resulting bytes depend on, see `PreparedQuantization.settings`; only a run with the same settings continues.
        threads: of torch when the run began. Sums of another number of threads round differently, so a continued run
            computes with as many.
        blocks: finished decoder blocks.
        shards: `Shards.state` after them.
        activations: file with the next block's inputs; "" without calibration. checksum: its CRC-32.
        shared: experts that too few tokens were routed to, which were quantized by the statistics of all.
        tables: stored name of every weight that is a packed table, and its bits.
        losses: relative loss of every quantized layer, by name.
        seconds: time spent so far.
    """

    settings: dict[str, Any]
    threads: int = 1
    blocks: int = 0
    shards: list[Shard] = field(default_factory=list)
    activations: str = ""
    checksum: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    seconds: float = 0.0

    @property
    def begun(self) -> bool:
        """Is everything outside the blocks written?"""
        return bool(self.shards)

    def write(self, folder: Path) -> None:
        draft = folder / _DRAFT
        draft.write_text(json.dumps(asdict(self)), encoding="utf-8")
        draft.replace(folder / JOURNAL)


def part_of(out: Path) -> Path:
    """The folder in which `out` is written until it is complete."""
    return out.with_name(f"{out.name}.part")


def check_output(out: Path) -> None:
    """Raise `BadInput` if `out` exists and is not an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        kind = "folder" if out.is_dir() else "file"
        raise BadInput(
            msg("The {kind} {out} already exists.", kind=kind, out=out),
            msg("Choose another name; nothing is overwritten."),
        )


@contextmanager
def opened(
    out: Path, settings: Mapping[str, Any], threads: int = 1, restart: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """The unfinished folder and its journal, locked against other processes within the context.

    A folder with the same settings is continued.

    Args:
        threads: of torch, for a new run.
        restart: delete what a run with other settings has finished, instead of refusing.

    Raises:
        BadInput: another process is writing it, or its blocks were quantized with other settings.
        CorruptModel: the folder is not an unfinished quantization, or its journal is damaged.
    """
    part = part_of(out)
    if part.exists() and not (part / JOURNAL).is_file() and {path.name for path in part.iterdir()} - {_LOCK, _DRAFT}:
        raise CorruptModel(
            msg(
                "{part} is in the way: it has no {journal}, so it is not an unfinished quantization.",
                part=part,
                journal=JOURNAL,
            ),
            msg("Delete or rename it, or choose another output folder."),
        )
    part.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(
            msg("{out} is being written by another process.", out=out),
            msg("Wait for it to finish, or choose another name."),
        ) from None
    try:
        yield part, _continued(part, dict(settings), threads, restart)
    finally:
        lock.release()


def _continued(part: Path, settings: dict[str, Any], threads: int, restart: bool) -> Journal:
    found = _read(part) if (part / JOURNAL).is_file() else None
    # Through JSON, as the stored settings were: tuples become lists.
    settings = json.loads(json.dumps(settings))
    if found is not None and found.settings == settings and found.begun:
        return found
    if found is not None and found.begun and not restart:
        raise BadInput(
            msg(
                "{part} holds {blocks:,} finished blocks of a quantization that cannot be continued: {differences}.",
                part=part.name,
                blocks=found.blocks,
                differences=join("; ", tuple(_differences(found.settings, settings))),
            ),
            msg("Start over, which deletes them (--restart on the command line), or choose another output folder."),
        )
    journal = Journal(settings, threads)
    journal.write(part)  # first: a folder without a journal is nobody's
    for path in part.iterdir():
        if path.name not in (_LOCK, JOURNAL):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return journal


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Every setting that differs, with both values where a person can read them."""
    digests = {"model": msg("the model's files"), "calibration": msg("the calibration text")}
    for name in (name for name in {**before, **now} if before.get(name) != now.get(name)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new)
        elif name in digests:
            yield msg("{name} changed", name=digests[name])
        else:
            yield msg("{name} was {old}, now {new}", name=name, old=old, new=new)


def _read(part: Path) -> Journal:
    try:
        return build(Journal, read_object(LocalFolder(part), JOURNAL), JOURNAL)
    except CorruptModel:
        raise CorruptModel(
            msg("The journal of the unfinished {part} cannot be read.", part=part),
            msg("Delete {part} and start again.", part=part),
        ) from None


def publish(part: Path, out: Path) -> None:
    """Rename the finished folder to its final name. Until then it has its journal, so that a run that is killed can continue."""
    (part / _LOCK).unlink(missing_ok=True)
    if out.is_dir():
        out.rmdir()
    part.replace(out)
    with suppress(OSError):  # the result is complete
        (out / JOURNAL).unlink()
