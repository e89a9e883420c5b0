"""Turns a prompt or a conversation into token ids and checks that they fit the model's context."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.generate.chat import ROLES, ChatMessage
from lowmem.generate.templates import render
from lowmem.generate.tokens import token_ids, with_special
from lowmem.messages import msg

log = logging.getLogger("lowmem.prompts")


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[ChatMessage], raw: bool = False, cancel: CancelToken | None = None
) -> list[int]:
    """Token ids of the prompt that the model is to continue.

    A conversation is rendered with the tokenizer's chat template, and so is a plain text (as a single user message)
    unless `raw`. Without a template, a text is continued as is, and a conversation is laid out as "User: ...",
    "Assistant:".

    Args:
        prompt: a text, or messages with "role" (system, user or assistant) and "content" (a text, or a list of
            {"type": "text", "text": ...}); the last message must not be the assistant's.

    Raises:
        BadInput: an empty prompt, a malformed message, or one that the template rejects.
        CorruptModel: the template fails, or exceeds its time or memory.
        Cancelled: while the template was rendered.
    """
    messages = [_message(m) for m in ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]
    _check_messages(messages)
    if tokenizer.chat_template and not raw:
        # The template includes the special tokens.
        ids = token_ids(tokenizer, _templated(tokenizer, messages, cancel))
    else:
        ids = with_special(tokenizer, prompt if isinstance(prompt, str) else _layout(messages))
    if not ids:
        raise BadInput(
            msg("The tokenizer produces no tokens for the prompt."), msg("Use a script that the model supports.")
        )
    return ids


def check_length(prompt_tokens: int, max_new_tokens: int, context: int) -> tuple[int, str]:
    """The most tokens the answer may have, and a note if they are fewer than `max_new_tokens` (else "").

    Raises:
        BadInput: the prompt leaves no room for an answer.
    """
    room = context - prompt_tokens
    if room < 1:
        raise BadInput(
            msg(
                "The prompt has {prompt_tokens:,} tokens, but prompt and answer together may have only {context:,}.",
                prompt_tokens=prompt_tokens,
                context=context,
            ),
            msg("Shorten the prompt by at least {difference:,} tokens, or use a longer context.", difference=1 - room),
        )
    if max_new_tokens <= room:
        return max_new_tokens, ""
    note = msg(
        "The prompt has {prompt_tokens:,} of the context's {context:,} tokens, so the answer is limited to {room:,}.",
        prompt_tokens=prompt_tokens,
        context=context,
        room=room,
    )
    return room, note


def _message(message: ChatMessage) -> dict[str, str]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        roles = ", ".join(ROLES)
        raise BadInput(
            msg("A message in the conversation has no valid role."), msg("Use one of the roles {roles}.", roles=roles)
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        texts: list[Any] = [block.get("text") if isinstance(block, Mapping) else None for block in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise BadInput(msg("A message in the conversation contains something other than text."), msg("Send text only."))
    return {"role": message["role"], "content": content}


def _check_messages(messages: Sequence[dict[str, str]]) -> None:
    if not messages or not messages[-1]["content"].strip():
        raise BadInput(msg("The prompt is empty."), msg("Write something for the model to answer."))
    if messages[-1]["role"] == "assistant":
        raise BadInput(msg("The conversation ends with an assistant message."), msg("End it with a user message."))


def _layout(messages: Sequence[dict[str, str]]) -> str:
    lines = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n".join([*lines, "Assistant:"])


def _templated(tokenizer: Any, messages: list[dict[str, str]], cancel: CancelToken | None) -> str:
    try:
        return render(tokenizer, messages, cancel)
    except TemplateError as error:
        refusal = error
    folded = _without_system(messages)
    if folded != messages:
        log.info(
            "the chat template rejected the system message, which is now put in front of the first user message: %s",
            refusal,
        )
        try:
            return render(tokenizer, folded, cancel)
        except TemplateError as error:
            refusal = error
    raise BadInput(
        msg("The model's chat template rejects this conversation: {refusal}.", refusal=refusal),
        msg("Alternate user and assistant messages, starting with the user."),
    ) from refusal


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Move system messages to the top of the first user message, for templates without a system role."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    if not system or not others:
        return messages
    first = {"role": others[0]["role"], "content": "\n\n".join([*system, others[0]["content"]])}
    return [first, *others[1:]]
