"""Turns failures into text for the page, and refuses text that no model could take."""

from __future__ import annotations

import logging
import secrets

import gradio as gr

from lowmem.errors import LESS_MEMORY, BadInput, Cancelled, LowMemError, file_error, is_out_of_memory
from lowmem.messages import msg, translate
from lowmem.ui.language import escape

log = logging.getLogger("lowmem.ui")

TEXT_LIMIT = 200_000
"""Most characters of a prompt or conversation."""


def explain(error: Exception) -> tuple[str, str]:
    """(sentence, hint) for a person. A bug keeps its traceback in the log, under a short id."""
    if isinstance(error, LowMemError):
        return error.message, error.hint
    if is_out_of_memory(error):
        return msg("Memory ran out."), LESS_MEMORY
    if isinstance(error, OSError):
        return explain(file_error(error, msg("The work was not finished")))
    short = secrets.token_hex(3)
    log.error("bug %s", short, exc_info=error)
    return msg("Something went wrong inside lowmem."), msg("See the log for details ({id}).", id=short)


def notice(error: Exception, *, toast: bool = True) -> str:
    """The failure as HTML that stays in place, and as a toast (only queued events can show one)."""
    message, hint = map(escape, explain(error))
    if isinstance(error, Cancelled):
        return f'<p class="lm-notice" data-kind="quiet" role="status">{message}</p>'
    if toast:
        gr.Warning(f"{message} {hint}".strip(), title=translate(msg("Something went wrong")))
    return f'<div class="lm-notice" data-kind="error" role="alert"><strong>{message}</strong> {hint}</div>'


def bounded(*texts: str) -> None:
    """Refuse text that is beyond any context.

    Raises:
        BadInput: empty, or above `TEXT_LIMIT` characters in all.
    """
    count = sum(map(len, texts))
    if not any(text.strip() for text in texts):
        raise BadInput(msg("There is nothing to send."), msg("Write something first."))
    if count > TEXT_LIMIT:
        raise BadInput(
            msg("The text has {count:,} characters, more than the {limit:,} allowed.", count=count, limit=TEXT_LIMIT),
            msg("Shorten it."),
        )
