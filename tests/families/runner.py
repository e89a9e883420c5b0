"""Each type in a process of its own, with a time limit: what kills it costs one cell."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from families import check, matrix, zoo

SECONDS = 120
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
        for action in ("reference", *left):
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
        if cells["reference"] != "ok":
            return dict.fromkeys(actions, matrix.CANNOT + cells["reference"])
    return {action: cells[action] for action in actions}


def _child(kind: str, actions: list[str], results: Connection) -> None:
    """Send "ok" or why transformers has no answers to compare with, then each action's cell."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, Path(os.devnull).open("w") as nowhere:
        os.environ["LOWMEM_HOME"] = root
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            case = check.Case(kind, Path(root))
            try:
                zoo.save(kind, case.folder)
                _ = case.reference
            except Exception as error:
                results.send(f"{type(error).__name__}: {check.first_line(error)}")
                return
            results.send("ok")
            for action in actions:
                results.send(check.outcome(case, action))
