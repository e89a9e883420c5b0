"""Parsing model references, before anything is read from disk or network.

On a public page these strings are untrusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import BadInput
from lowmem.messages import msg
from lowmem.settings import settings

DEMO = "demo"
DEMO_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_LENGTH = 400

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"(?P<repo>{_PART}(?:/{_PART})?)(?:/(?P<file>[A-Za-z0-9][A-Za-z0-9._-]{{0,150}}\.gguf))?"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,100}))?"
)
_HINT = msg('Use "demo", a hub id such as HuggingFaceTB/SmolLM2-360M-Instruct, a model folder, or a .gguf file.')


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed and validated reference.

    Args:
        kind: "demo", "hub", "hub_gguf" (one file of a repository), "folder" or "gguf".
        text: as typed, without surrounding whitespace.
        repo, revision, file: of a hub reference.
        path: of a folder or GGUF file, absolute.
    """

    kind: str
    text: str
    repo: str = ""
    revision: str = "main"
    file: str = ""
    path: Path = Path()

    @property
    def name(self) -> str:
        """Short display name."""
        if self.kind in ("folder", "gguf"):
            return self.path.name.split("@")[0].split("--")[-1].removesuffix(".gguf")
        return (self.file or self.repo or DEMO_REPO).split("/")[-1].removesuffix(".gguf")


def parse_ref(ref: str, allow_paths: bool = True) -> Reference:
    """Parse `ref`. Checks whether a path exists; opens no file.

    Args:
        allow_paths: False on a public page: only local paths below `settings().models` and `settings().outputs`
            are then accepted.

    Raises:
        BadInput: not a reference, or a path that is not allowed.
    """
    text = ref.strip() if isinstance(ref, str) else ""
    if not text or len(text) > MAX_LENGTH or not text.isprintable():
        raise BadInput(
            msg("The name of the model is empty.")
            if not text
            else msg("{text!r} is not a valid model name.", text=text[:40]),
            _HINT,
        )
    if text == DEMO:
        return Reference("demo", text)
    path = _local_path(text, look=allow_paths)
    if path is not None:
        if not allow_paths and not any(path.is_relative_to(root) for root in _open_roots()):
            raise BadInput(msg("{text!r} is outside the folders that this page has access to.", text=text[:80]), _HINT)
        return Reference("gguf" if path.suffix.lower() == ".gguf" else "folder", text, path=path)
    match = _HUB.fullmatch(text)
    if not match or ".." in text or "--" in match["repo"]:
        raise BadInput(msg("{text!r} is not the name of a model.", text=text[:80]), _HINT)
    kind = "hub_gguf" if match["file"] else "hub"
    return Reference(kind, text, match["repo"], match["revision"] or "main", match["file"] or "")


def _local_path(text: str, look: bool) -> Path | None:
    """The absolute path that `text` names, None for a hub id. With `look`, an existing file or folder wins."""
    explicit = text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or text[1:3] in (":\\", ":/")
    try:
        path = Path(text).expanduser()
        gguf = path.suffix.lower() == ".gguf"
        explicit = explicit or (gguf and text.count("/") < 2)
        if explicit or (look and (path.is_file() if gguf else (path / "config.json").is_file())):
            return path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise BadInput(msg("{text!r} is not a path that can be read.", text=text[:80]), _HINT) from None
    return None


def _open_roots() -> tuple[Path, Path]:
    return settings().models.resolve(), settings().outputs.resolve()
