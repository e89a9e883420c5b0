"""The manifest of an exported folder. Imports neither torch nor onnx."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.errors import CorruptModel, ModelNotFound, Unsupported
from lowmem.messages import msg
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.foreign import build, short
from lowmem.models.model_files import MANIFEST

VERSION = 2
"""Version 1 calls the parity check "proof"."""

GRAPH, PREFILL, DATA = "model.onnx", "prefill.onnx", "model.onnx.data"

_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*")
"""File names become paths, and an export may be untrusted."""

KEEP = "logits_to_keep"
"""An optional input [1] of fused graphs: the number of last tokens whose logits are computed."""


@dataclass(frozen=True)
class Manifest:
    """
    Args:
        model, source: name of the model, and the reference it was exported from.
        precision: "fp32", "fp16", "int8" or "int4".
        kind: "fused" (cache in place, rows aligned left), "decoder" (cache as new outputs) or "encoder".
        files: name -> bytes of every graph and weight file.
        weights_bytes: their size in a session.
        int8_range: largest code of dynamic int8 weights, 0 if there are none.
        group_size: weights that share a scale in int4.
        model_tensors: (name, dtype, shape, bytes) of each tensor of the original.
        parity: the figures of `export.parity.ParityCheck`.
        optimised: nodes, fusions, bytes and seconds before and after, where the optimizer ran.
    """

    model: str
    source: str
    precision: str
    kind: str
    files: dict[str, int]
    weights_bytes: int
    int8_range: int = 0
    group_size: int = 32
    licence: str = ""
    model_tensors: list[tuple[str, str, list[int], int]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    optimised: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def check_files(self, folder: Path) -> None:
        """
        Raises:
            CorruptModel: a file is missing or has another size, naming both.
        """
        for name, size in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CorruptModel(
                    msg("{folder} lacks {name} ({size:,} bytes).", folder=folder.name, name=name, size=size),
                    msg("Export the model again."),
                )
            if (found := path.stat().st_size) != size:
                raise CorruptModel(
                    msg(
                        "{name} in {folder} has {found:,} bytes, but {size:,} were written.",
                        name=name,
                        folder=folder.name,
                        found=found,
                        size=size,
                    ),
                    msg("Export the model again."),
                )


def is_exported(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        ModelNotFound: no export there.
        CorruptModel: the manifest cannot be read, or files are missing or cut short.
        Unsupported: written by a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelNotFound(
            msg("{folder} contains no exported model ({manifest} is missing).", folder=folder, manifest=MANIFEST),
            msg("Export one first."),
        )
    try:
        values = read_object(LocalFolder(folder), MANIFEST)
        version = values.get("version")
        if type(version) is int and version > VERSION:
            raise Unsupported(
                msg(
                    "{folder} was written by a later lowmem (format {version}, this one reads {supported}).",
                    folder=folder.name,
                    version=short(version),
                    supported=VERSION,
                ),
                msg("Update lowmem, or export the model again."),
            )
        if "proof" in values:
            values["parity"] = values.pop("proof")
        manifest = build(Manifest, values, MANIFEST)
    except CorruptModel as error:
        raise CorruptModel(
            msg(
                "{manifest} in {folder} cannot be read: {error}",
                manifest=MANIFEST,
                folder=folder.name,
                error=error.message,
            ),
            msg("Export the model again."),
        ) from None
    outside = [name for name in manifest.files if not _PLAIN.fullmatch(name)]
    if outside:
        raise CorruptModel(
            msg(
                "{manifest} in {folder} names the file {outside!r}, which is not in the folder.",
                manifest=MANIFEST,
                folder=folder.name,
                outside=outside[0][:80],
            ),
            msg("Export the model again."),
        )
    manifest.check_files(folder)
    return manifest


def unfinished(out: Path) -> Path:
    """The path of `out` until it is complete and verified."""
    return out.with_name(f"{out.name}.part")


def discard(out: Path) -> None:
    """Delete the remains of an export into `out` whose process was killed."""
    shutil.rmtree(unfinished(out), ignore_errors=True)
