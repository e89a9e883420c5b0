"""Chat templates that do harm: they end with a sentence, and whoever runs the model answers the next prompt."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys
from transformers.utils.chat_template_utils import render_jinja_template

from lowmem.errors import BadInput, Cancelled, CorruptModel
from lowmem.events import CancelToken, Receipt
from lowmem.generate import template_process, templates
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import encode_prompt
from lowmem.machine import memory_limits
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import TEMPLATE_PROCESS_BYTES
from lowmem.planning.planner import plan
from lowmem.runtime.remote import WorkerSession
from lowmem.units import MB

LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% for k in range(90000) %}{% endfor %}{% endfor %}{% endfor %}"
LONG_OPERATION = "{{ 'a' * (10**8) ~ ('b' * (10**7)) | replace('b', 'cc') | length }}{{ 10 ** (10 ** 8) % 7 }}"
HUGE = ["{{ 'a' * (10**10) }}", "{{ 'a' | center(10**9) }}", "{{ '%1000000000d' | format(1) }}", "{{ 'ab' * 500000 }}"]
CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": 'Hi "there"\n'},
    {"role": "assistant", "content": "Hello 🙂"},
    {"role": "user", "content": "Bye"},
]
SOUND = [
    toys.CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}\n{% endfor %}",
    "{% set n = namespace(last='') %}{% for m in messages %}{% set n.last = m.content | trim %}{% endfor %}{{ n.last }}",
    "{% for m in messages %}\n  {% generation %}{{ m['content'] }}{% endgeneration %}\n  {% endfor %}",
    "{% if tools is none and documents is none %}{{ dict(a=1) }}{% endif %}{{ add_generation_prompt }}{{ nothing }}",
    "{% macro turn(m) %}<{{ m.role }}>{{ m.content.strip() }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
]


def with_template(template: str) -> Any:
    changed = copy.deepcopy(toys.tokenizer())
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", SOUND)
def test_sound_templates_render_as_in_transformers(template: str) -> None:
    tokenizer = with_template(template)
    expected, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    assert templates.render(tokenizer, CHAT) == expected[0]


@pytest.mark.parametrize("template", [LOOPS, LONG_OPERATION])
def test_a_template_without_end_ends(template: str) -> None:
    templates.render(toys.tokenizer(), CHAT)
    started = time.monotonic()
    with pytest.raises(CorruptModel, match="longer than 2 s"):
        encode_prompt(with_template(template), "Hi")
    assert time.monotonic() - started < 4
    assert encode_prompt(toys.tokenizer(), "Hi")


@pytest.mark.parametrize("template", HUGE)
def test_a_template_of_gigabytes_is_refused(template: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(CorruptModel, match="more than 268 MB of memory"):
        encode_prompt(with_template(template), "Hi")
    assert psutil.Process().memory_info().rss - before < 64e6


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ dict.__init__.__globals__ }}",
        "{%",
    ],
)
def test_a_template_that_fails_is_a_sentence(template: str) -> None:
    with pytest.raises((CorruptModel, BadInput), match="chat template"):
        encode_prompt(with_template(template), "Hi")


def test_stop_ends_a_template() -> None:
    cancel = CancelToken()
    threading.Timer(0.4, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        encode_prompt(with_template(LOOPS), "Hi", cancel=cancel)
    assert time.monotonic() - started < 1.5


def test_a_conversation_waits_for_no_new_process() -> None:
    tokenizer = toys.tokenizer()
    templates.render(tokenizer, CHAT)
    started = time.perf_counter()
    for _ in range(100):
        templates.render(tokenizer, CHAT)
    assert time.perf_counter() - started < 1.0


def test_the_process_shares_the_budget_of_the_model() -> None:
    templates._process.end()
    before = memory_limits.other_processes_bytes()
    templates.render(toys.tokenizer(), CHAT)
    held = memory_limits.other_processes_bytes() - before
    assert 10 * MB < held < TEMPLATE_PROCESS_BYTES * 1.1
    templates._process.end()
    assert memory_limits.other_processes_bytes() == before
    assert memory_limits.children() == ()


def test_an_idle_process_ends_and_another_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    process = templates.TemplateProcess()
    values = {"messages": CHAT}
    assert process.render("{{ messages | length }}", values, CancelToken()) == "4"
    assert process._child is not None
    process._child.process.kill()
    process._child.process.wait()
    assert process.render("{{ messages | length }}", values, CancelToken()) == "4"
    process.end()
    assert 0 < template_process.IDLE_SECONDS < 300


def test_a_model_answers_again_after_its_template_was_stopped(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).exists():
            text = (folder / name).read_text()
            old = toys.CHAT_TEMPLATE if name.endswith("jinja") else json.dumps(toys.CHAT_TEMPLATE)[1:-1]
            new = "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}"
            (folder / name).write_text(text.replace(old, new + old))
    session = WorkerSession()
    hardware = session.hardware()
    goal = Goal(context=256, precision="fp32", backend="torch")
    list(session.load(plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), goal)))
    options = GenerateOptions(max_new_tokens=3)
    page = memory_limits.process_bytes()
    assert len(memory_limits._others) == 1
    try:
        with pytest.raises(CorruptModel, match="longer than 2 s"):
            list(session.generate("loop", options))
        with pytest.raises(CorruptModel, match="longer than 2 s"):
            list(session.batch(["loop"], options))
        assert isinstance(list(session.generate("Hi", options))[-1], Receipt)
        assert len(memory_limits._others) == 2  # its model's process, and the one that renders
        assert memory_limits.process_bytes() > page + 10 * MB
    finally:
        session.unload()
    assert memory_limits._others == []
