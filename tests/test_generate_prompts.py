"""Prompts and conversations to token ids, with and without a chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from toys import CHAT_TEMPLATE, NAMES, save_toy, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem.errors import BadInput
from lowmem.generate.prompts import check_length, encode_prompt

STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def with_template(template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer())
    changed.chat_template = template
    return changed


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def test_a_text_is_one_message_where_there_is_a_template() -> None:
    expected = "<turn>user\nHi<eos><turn>assistant\n"
    assert text_of(encode_prompt(tokenizer(), "Hi")) == expected
    assert text_of(encode_prompt(tokenizer(), [{"role": "user", "content": "Hi"}])) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_raw_continues_the_text_as_it_is(template: str | None) -> None:
    assert text_of(encode_prompt(with_template(template), "Hi there ", raw=True)) == "Hi there "


def test_without_a_template_a_text_is_continued_and_a_conversation_laid_out() -> None:
    assert text_of(encode_prompt(with_template(None), "Hi")) == "Hi"
    expected = "Be brief.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    assert text_of(encode_prompt(with_template(None), CHAT)) == expected


def test_content_may_come_in_blocks_of_text() -> None:
    blocks = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text_of(encode_prompt(tokenizer(), blocks)) == "<turn>user\na\nb<eos><turn>assistant\n"


def test_a_refused_system_message_opens_the_first_user_message() -> None:
    strict = with_template(STRICT_TEMPLATE)
    assert text_of(encode_prompt(strict, CHAT)) == "[user]Be brief.\n\nHi[assistant]Hello[user]Bye"


def test_what_the_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(BadInput, match="Roles must alternate"):
        encode_prompt(with_template(STRICT_TEMPLATE), [CHAT[1], CHAT[3]])


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("empty", ["", "  \n", [], [{"role": "user", "content": " "}]])
def test_an_empty_prompt_is_refused(empty: Any, raw: bool) -> None:
    with pytest.raises(BadInput, match="empty"):
        encode_prompt(tokenizer(), empty, raw)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "oracle", "content": "Hi"}, "no valid role"),
        ({"content": "Hi"}, "no valid role"),
        ("Hi", "no valid role"),
        ({"role": "user"}, "something other than text"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "something other than text"),
        ({"role": "assistant", "content": "Hi"}, "ends with an assistant message"),
    ],
)
def test_malformed_messages_are_refused(message: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        encode_prompt(tokenizer(), [message])


def test_the_answer_is_fitted_to_the_context() -> None:
    assert check_length(10, 20, 30) == (20, "")
    shortened, note = check_length(1500, 1000, 2048)
    assert shortened == 548
    assert all(number in note for number in ("548", "1,500", "2,048"))
    with pytest.raises(BadInput, match=r"5,000 tokens.*2,048") as caught:
        check_length(5000, 20, 2048)
    assert "at least 2,953 tokens" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_toy_loads_like_any_model(name: str, tmp_path: Path) -> None:
    folder = save_toy(name, tmp_path / "toy")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert encode_prompt(loaded, "Grüße 🙂") == encode_prompt(tokenizer(), "Grüße 🙂")
    assert loaded.decode(loaded("Grüße 🙂")["input_ids"]) == "Grüße 🙂"
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(loaded)
