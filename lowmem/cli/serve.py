"""`python -m lowmem serve`: the web app."""

from __future__ import annotations

import argparse
from typing import Any

from lowmem.ui.flags import add_flags


def add_command(commands: Any) -> None:
    """Add `serve` to the subparsers of the command line."""
    parser = commands.add_parser("serve", help="the web app")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lowmem.ui.launch import serve  # gradio comes with it

    serve(**{name: value for name, value in vars(args).items() if name != "run"})
    return 0
