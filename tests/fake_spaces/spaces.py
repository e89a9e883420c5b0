"""The package `spaces` as far as lowmem can tell, on a machine without ZeroGPU: a forked worker that lends the CPU.

As there, arguments and what is yielded are pickled, errors lose their sentence, a closed generator stops the worker,
and the worker lives on for the next call. `ZEROGPU_LOG` names a file for the seconds that were asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

assert "torch" not in sys.modules, "spaces must be imported before torch"

FORK = multiprocessing.get_context("fork")


class Error(Exception):
    """Gradio's, as `spaces` raises it."""

    def __init__(self, title: str, message: str) -> None:
        super().__init__(message)
        self.title, self.message = title, message


class Worker:
    def __init__(self, task: Any) -> None:
        self.asked, self.results, self.stop = FORK.Queue(), FORK.Queue(), FORK.Event()
        FORK.Process(target=self._serve, args=(task,), daemon=True).start()

    def _serve(self, task: Any) -> None:
        parent = os.getppid()
        while True:
            try:
                args, kwargs = self.asked.get(timeout=1)
            except queue.Empty:
                if os.getppid() != parent:  # the app was killed
                    return
                continue
            self.stop.clear()
            events = task(_on_cpu(args[0]), *args[1:], **kwargs)
            try:
                for event in events:
                    if self.stop.is_set():
                        events.close()
                        break
                    self.results.put(("value", event))
            except Exception as error:
                self.results.put(("error", type(error).__name__))
            self.results.put(("end", None))


def _on_cpu(plan: Any) -> Any:
    from lowmem.machine.device import CPU

    return replace(plan, device=CPU, precision="fp32", estimates=(plan.estimate("ram"),))


def GPU(task: Any = None, *, duration: Any = None) -> Any:  # noqa: N802  its name there
    if task is None:
        return partial(GPU, duration=duration)
    if not os.environ.get("SPACES_ZERO_GPU"):
        return task
    workers: list[Worker] = []

    @wraps(task)
    def handler(*args: Any, **kwargs: Any) -> Any:
        seconds = duration(*args, **kwargs)
        if log := os.environ.get("ZEROGPU_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{seconds}\n")
        if os.environ.get("ZEROGPU_QUOTA") == "0":
            raise Error("ZeroGPU quota exceeded", f"You have exceeded your quota ({seconds}s requested vs. 0s left). ")
        if not workers:
            workers.append(Worker(task))
        worker = workers[0]
        worker.asked.put((args, kwargs))
        ended = False
        try:
            while True:
                kind, value = worker.results.get()
                if kind == "value":
                    yield value
                elif kind == "error":
                    raise Error("ZeroGPU worker error", value)
                else:
                    ended = True
                    return
        finally:
            worker.stop.set()
            while not ended:
                ended = worker.results.get()[0] == "end"

    return handler
