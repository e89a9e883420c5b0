"""Renders chat templates in a process of their own, with limits of time and memory: a template is a stranger's program.

The process is started with the first conversation and ends some seconds after the last one, so that every answer of a
conversation but the first waits for less than a millisecond.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from concurrent.futures import wait
from typing import Any

from jinja2 import TemplateError

from lowmem.background import in_background
from lowmem.errors import CorruptModel, LowMemError
from lowmem.events import CancelToken
from lowmem.generate.template_process import MEMORY_BYTES, SECONDS
from lowmem.machine.child import Child
from lowmem.machine.memory_limits import add_child, remove_child
from lowmem.messages import msg
from lowmem.units import format_bytes

START_SECONDS = 60.0
"""For the process to start, on a busy machine."""

LATE_SECONDS = 1.0
"""The process ends itself after `SECONDS`; where it cannot, it is ended after this much more."""

TICK_SECONDS = 0.05

WITHOUT = msg("Continue plain text without the template, or choose another model.")


class _Ended(Exception):
    """The process has ended without an answer."""


class TemplateProcess:
    """One process that renders; started again when it has ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        atexit.register(self.end)

    def render(self, template: str, values: dict[str, Any], cancel: CancelToken) -> str:
        """The text of a template.

        Raises:
            TemplateError: the template refuses the values, in its own words.
            CorruptModel: it is no template, or exceeds its time or memory.
            Cancelled: within a tick; the process has ended.
        """
        request = json.dumps({"template": template, "values": values}, default=str).encode() + b"\n"
        with self._lock:
            answer = self._answer(request, cancel)
        if "refused" in answer:
            raise TemplateError(answer["refused"])
        if answer.get("failed") == "memory":
            raise CorruptModel(
                msg("The model's chat template needs more than {size} of memory.", size=format_bytes(MEMORY_BYTES)),
                WITHOUT,
            )
        if "failed" in answer:
            raise CorruptModel(msg("The model's chat template failed: {error}.", error=answer["failed"]), WITHOUT)
        return answer["text"]

    def end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()
            remove_child(child.pid)

    def _answer(self, request: bytes, cancel: CancelToken) -> dict[str, str]:
        while True:
            fresh = self._child is None or self._child.process.poll() is not None
            if fresh:
                self._start(cancel)
            sent = time.monotonic()
            try:
                self._send(request)
                return self._received(cancel)
            except _Ended:
                self.end()
                if fresh or time.monotonic() - sent > SECONDS / 2:  # else it had been idle and ended just now
                    raise CorruptModel(
                        msg("The model's chat template takes longer than {seconds:.0f} s.", seconds=SECONDS), WITHOUT
                    ) from None
            except BaseException:
                self.end()
                raise

    def _start(self, cancel: CancelToken) -> None:
        self.end()
        try:
            self._child = child = Child("lowmem.generate.template_process")
        except OSError as error:
            raise LowMemError(
                msg(
                    "A process for the chat template could not be started: {error}.", error=error.strerror or str(error)
                ),
                msg("Close other programs."),
            ) from error
        try:
            self._line(START_SECONDS, cancel)
            add_child(child.pid)
        except _Ended:
            self.end()
            raise child.death(msg("process for the chat template")) from None

    def _send(self, request: bytes) -> None:
        assert self._child is not None
        try:
            self._child.input.write(request)
            self._child.input.flush()
        except OSError:
            raise _Ended from None

    def _received(self, cancel: CancelToken) -> dict[str, str]:
        answer: dict[str, str] = json.loads(self._line(SECONDS + LATE_SECONDS, cancel))
        return answer

    def _line(self, seconds: float, cancel: CancelToken) -> bytes:
        assert self._child is not None
        line = in_background(self._child.output.readline)
        deadline = time.monotonic() + seconds
        while not line.done():
            cancel.check()
            if time.monotonic() > deadline:
                raise _Ended
            wait([line], TICK_SECONDS)
        if not line.result().endswith(b"\n"):  # the end of the process may cut a line anywhere
            raise _Ended
        return line.result()


_process = TemplateProcess()


def render(tokenizer: Any, messages: list[dict[str, str]], cancel: CancelToken | None = None) -> str:
    """The conversation as the tokenizer's chat template lays it out, up to where the assistant's answer begins.

    Raises:
        TemplateError, CorruptModel, Cancelled: see `TemplateProcess.render`.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them for chats
        raise CorruptModel(msg("The model's chat template failed: {error}.", error=str(error)[:200]), WITHOUT) from None
    values = {"tools": None, "documents": None, "add_generation_prompt": True, **tokenizer.special_tokens_map}
    return _process.render(template, {**values, "messages": messages}, cancel or CancelToken())
