"""Each type in a process of its own, with a time limit: what kills it costs one cell."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from families import check, zoo

SECONDS = 600
"""The most that one action of one toy may take."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["families.runner"])  # torch and transformers are imported once


def run(kind: str, actions: list[str]) -> dict[str, str]:
    """The cells of one type by action, see `check.outcome`."""
    cells: dict[str, str] = {}
    while left := [action for action in actions if action not in cells]:
        receiver, sender = _server.Pipe(duplex=False)
        process = _server.Process(target=_child, args=(kind, left, sender))
        process.start()
        sender.close()
        for action in left:
            died = ""
            try:
                if receiver.poll(SECONDS):
                    cells[action] = receiver.recv()
                else:
                    died = f"not done after {SECONDS} s"
            except EOFError:
                process.join()
                died = f"its process ended with {process.exitcode}"
            if died:
                process.kill()
                cells[action] = f"CRASH: {died}"
                break
        process.join(SECONDS)
    return cells


def _child(kind: str, actions: list[str], results: Connection) -> None:
    """Send each action's cell."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with tempfile.TemporaryDirectory() as root:
        case = check.Case(kind, Path(root))
        zoo.save(kind, case.folder)
        for action in actions:
            results.send(check.outcome(case, action))
