"""Reading a text through any cache; what is remembered of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_generate_cache_window import GREEDY
from toys import prompt, tokenizer, toy

from lowmem.datasets.texts import evaluation_text
from lowmem.errors import BadInput, Cancelled
from lowmem.events import CancelToken
from lowmem.longctx import actions
from lowmem.longctx.needle import Recall, recall
from lowmem.longctx.reading import Reader, cache_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime.session import Session


def surprise(ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = toy("llama")(torch.tensor([ids])).logits[0, :-1]
    return -torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_the_full_cache_reads_like_one_pass() -> None:
    ids = prompt(300)
    reader = Reader(toy("llama"), ids, GREEDY)
    first = torch.cat(list(reader.read(100)))
    assert reader.seconds_per_token(3) > 0
    rest = torch.cat(list(reader.read(300)))
    expected = surprise(ids)
    torch.testing.assert_close(first, expected[:100], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rest, expected[103:], atol=1e-3, rtol=1e-4)


def test_a_window_computed_anew_sees_nothing_before_it() -> None:
    ids = prompt(100)
    reader = Reader(toy("llama"), ids, replace(GREEDY, window=16, use_cache=False))
    list(reader.read(90))
    reader.seconds_per_token(1)
    got = torch.cat(list(reader.read(92)))
    expected = surprise(ids[92 - 16 : 93])[-1]
    torch.testing.assert_close(got[-1], expected, atol=1e-3, rtol=1e-4)


def test_bytes_of_a_window_stop_growing() -> None:
    reader = Reader(toy("llama"), prompt(200), replace(GREEDY, window=32, sinks=4))
    sizes = []
    for until in (18, 36, 100, 200):
        list(reader.read(until))
        sizes.append(reader.cache_bytes())
    per_token = 2 * 2 * 2 * 16 * 4
    assert sizes[0] == 18 * (36 * per_token + 2 * 2 * 4 * 2 * 16 * 4) // 36
    assert sizes[1] == sizes[2] == sizes[3] == cache_bytes(reader.cache, 36)


def test_stop_and_short_texts() -> None:
    cancel = CancelToken()
    cancel.set()
    with pytest.raises(Cancelled):
        list(Reader(toy("llama"), prompt(50), GREEDY).read(50, cancel))
    with pytest.raises(BadInput, match="1 tokens, too few"):
        Reader(toy("llama"), [1], GREEDY)


def test_a_recalled_word_is_likelier_than_the_control() -> None:
    assert Recall(10, 0.3, 0.01).recalled
    assert not Recall(10, 0.02, 0.01).recalled
    found = recall(toy("llama"), tokenizer(), prompt(100), replace(GREEDY, window=32), 50, trials=1)
    assert 0 <= found.probability <= 1
    with pytest.raises(BadInput, match="fewer than 200"):
        recall(toy("llama"), tokenizer(), prompt(100), GREEDY, 200)


@pytest.mark.real
def test_the_demo_model_recalls_what_is_in_its_window_and_nothing_beyond() -> None:
    session = Session()
    hardware = session.hardware()
    goal = Goal(precision="int8", backend="torch")
    for _ in session.load(plan(read_spec("demo"), hardware, MemoryBudget.detect(hardware), goal)):
        pass
    options = replace(GREEDY, window=512, cache_type="int8")
    *_, receipt = actions.recall(session, evaluation_text().text, options, distances=(256, 1024))
    within, beyond = receipt.details["recalls"]
    assert within["recalled"]
    assert within["probability"] > 10 * beyond["probability"]
    assert not beyond["recalled"]
