"""The flags of the page: those of `python app.py` and of `python -m lowmem serve`. Imports no gradio."""

from __future__ import annotations

import argparse

from lowmem.messages import languages


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `launch.serve` takes, under its names."""
    parser.add_argument("--port", type=int, help="port to listen on (7860, or the next free one)")
    parser.add_argument("--host", help="address to listen on (this machine only)")
    parser.add_argument("--share", action="store_true", help="also through a public link, behind a password")
    parser.add_argument("--auth", metavar="USER:PASS", help="require this sign-in")
    parser.add_argument("--budget", metavar="SIZE", help="the most memory of the computing device for all, such as 4G")
    parser.add_argument("--model", metavar="REF", help="model to propose: a hub id, a folder, a .gguf file")
    parser.add_argument("--lang", choices=languages(), help="language of the page (default: that of each browser)")
    parser.add_argument("--listed-only", action="store_true", help="visitors run the listed models and no others")
    parser.add_argument("--mcp", action="store_true", help="offer everything as MCP tools, too")
