"""Flags that several commands share, and the flags of an options dataclass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowmem.errors import BadInput
from lowmem.fields import Option, build, describe
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import msg
from lowmem.units import parse_bytes

Options = TypeVar("Options")

MODEL_HELP = "demo, a hub id, a folder or a .gguf file"

RENAMED = {"plan": {"--kv": "--cache-type"}}
"""Command -> old flag -> new flag, for flags that are not options of a dataclass. Old ones work for one release."""


def current_names(arguments: Sequence[str]) -> list[str]:
    """`arguments` with renamed flags under their new names; a line on standard error reports each."""
    renamed, found = RENAMED.get(arguments[0] if arguments else "", {}), []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in renamed:
            report_rename(flag, renamed[flag])
            argument = renamed[flag] + equals + value
        found.append(argument)
    return found


def report_rename(old: str, new: str) -> None:
    print(f"{old} is now called {new}; the old name will be removed.", file=sys.stderr)


def size(text: str) -> int:
    """The argparse type of a memory size such as "6G"; returns bytes."""
    try:
        return parse_bytes(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_budget(parser: argparse.ArgumentParser, vram: bool = True) -> None:
    """Add --ram and, unless the command never uses a GPU, --vram."""
    parser.add_argument("--ram", metavar="SIZE", type=size, help="RAM budget, e.g. 4G")
    if vram:
        parser.add_argument("--vram", metavar="SIZE", type=size, help="GPU memory budget, e.g. 6G")


def budget(args: argparse.Namespace) -> MemoryBudget:
    """The memory budget from flags added by `add_budget`.

    Raises:
        BadInput: below 100 MB.
    """
    return MemoryBudget.parse(args.ram, getattr(args, "vram", None))


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="continue even if the estimate exceeds the budget")


def add_json(parser: argparse.ArgumentParser, what: str = "receipt") -> None:
    parser.add_argument("--json", action="store_true", help=f"print only the {what}, as one JSON object")


def add_options(parser: Any, kind: type, flags: Mapping[str, str] | None = None) -> None:
    """Add a flag for every field of the options dataclass `kind`; `flags` overrides the names of some."""
    for option in describe(kind):
        add_option(parser, option, (flags or {}).get(option.name, ""))


def add_option(parser: Any, option: Option, flag: str = "", suffix: str = "") -> None:
    """Add a flag for one option. It is None when absent, so `build` uses the default."""
    settings: dict[str, Any] = {"metavar": None if option.choices else "X", "choices": option.choices or None}
    if isinstance(option.default, bool):
        settings = {"action": argparse.BooleanOptionalAction}
    elif isinstance(option.default, tuple):
        settings = {"action": "append", "metavar": "TEXT"}
    help = f"{option.help}{suffix}".replace("%", "%%")
    parser.add_argument(flag or _flag(option.name), dest=option.name, help=help, **settings)
    for old in option.aliases:
        parser.add_argument(_flag(old), dest=old, **settings | {"help": argparse.SUPPRESS})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def explicit_options(args: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """The `options` that are on the command line, by name or earlier name, for `fields.build`."""
    names = [name for option in options for name in (option.name, *option.aliases)]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def options(args: argparse.Namespace, kind: type[Options]) -> Options:
    """The options dataclass `kind` from flags added by `add_options`.

    Raises:
        BadInput: a value is out of range.
    """
    return build(kind, explicit_options(args, describe(kind)))


def check_parent(path: Path | None) -> None:
    """
    Raises:
        BadInput: the folder that `path` is to be written to does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise BadInput(
            msg("There is no folder {parent}.", parent=path.absolute().parent),
            msg("Choose a path in an existing folder."),
        )
