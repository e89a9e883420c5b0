"""The catalogues of lowmem/locale. Run it after a text for people has changed, fill in what is empty, run it again.

Every call of `msg` is an entry; the first argument is its key. Babel reads and writes the files, but its own extractor
does not look into f-strings, where much of the page's HTML is made.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

import lowmem
import lowmem.errors

PACKAGE = Path(lowmem.__file__).parent


def catalogues() -> list[Path]:
    return sorted(PACKAGE.glob("locale/*/LC_MESSAGES/lowmem.po"))


def texts() -> Iterator[tuple[str, str]]:
    """Every text that can be shown, with its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="msg"), args=[ast.Constant(value=str(text))]):
                    yield text, str(path.relative_to(PACKAGE.parent))


SHOWN_ARGUMENTS = {
    **{name: (0, 1) for name, kind in vars(lowmem.errors).items() if isinstance(kind, type)},
    **{"Step": (2,), "Line": (2,), "option": (1, 2)},
}
"""Calls whose arguments at these places are shown to people."""


def unmarked() -> Iterator[str]:
    """Places where a bare string is shown, so that it stays English in every language."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli":  # the command line speaks English
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for place in SHOWN_ARGUMENTS.get(node.func.id, ()):
                    for argument in node.args[place : place + 1]:
                        text = bare_text(argument)
                        if any(map(str.isalpha, text)) and not text.startswith("pip install "):
                            yield f"{path.relative_to(PACKAGE.parent)}:{argument.lineno}"


def bare_text(node: ast.expr) -> str:
    """The letters of a string that is no message."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(bare_text(part) for part in parts)
        case ast.IfExp(body=first, orelse=second) | ast.BinOp(left=first, right=second):
            return bare_text(first) + bare_text(second)
    return ""


def read(path: Path) -> Catalog:
    with path.open("rb") as file:
        return read_po(file, locale=path.parts[-3])


def compiled(catalogue: Catalog) -> bytes:
    out = BytesIO()
    write_mo(out, catalogue)
    return out.getvalue()


def update(path: Path) -> None:
    """Bring a catalogue up to date and compile it."""
    template = Catalog(charset="utf-8")
    for text, file in texts():
        template.add(text, locations=[(file, None)])
    catalogue = read(path)
    catalogue.update(template, no_fuzzy_matching=True, update_creation_date=False)
    catalogue.obsolete.clear()
    with path.open("wb") as file:
        write_po(file, catalogue, width=0, sort_by_file=True, omit_header=False)
    path.with_suffix(".mo").write_bytes(compiled(catalogue))
    for message in catalogue:
        if message.id and not message.string:
            print(f"{path}: {message.id!r} is not translated")


if __name__ == "__main__":
    for one in catalogues():
        update(one)
