"""Times of reading, writing and loading, predicted from what earlier runs took."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys

from lowmem.events import Receipt, Step, drain
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.actions import hidden_states, sliding_perplexity
from lowmem.machine import rates
from lowmem.machine.budget import UNLIMITED
from lowmem.machine.hardware import probe
from lowmem.machine.timing import timed
from lowmem.measure.compare import compare
from lowmem.measure.estimate import total_seconds
from lowmem.measure.options import MeasureOptions
from lowmem.measure.variants import parse_variant
from lowmem.models.source import read_spec
from lowmem.planning import seconds
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(seconds, "SHORTEST", 0.0)  # toys are fast
    made = Session()
    drain(made.load(made.plan_for(str(toys.save_toy("llama", tmp_path / "toy")), Goal(context=128, precision="fp32"))))
    return made


def last(events) -> Receipt:
    *_, receipt = events
    return receipt


def test_what_was_never_done_has_no_time(session):
    with pytest.raises(rates.Unmeasured):
        seconds.reading_seconds(session.plan, 1000, 100)
    assert last(sliding_perplexity(session, TEXT, 64, 32)).predicted_seconds == 0


def test_a_second_run_is_predicted_by_the_first(session, tmp_path):
    for action, arguments in ((sliding_perplexity, (64, 32)), (hidden_states, (64, 64, tmp_path / "states.npy"))):
        first = last(action(session, TEXT, *arguments))
        second = last(action(session, TEXT, *arguments))
        assert second.predicted_seconds == pytest.approx(first.seconds, rel=1e-3)


def test_time_grows_with_tokens_and_with_the_window(session):
    plan = session.plan
    seconds.learn_reading(plan, 1000, 64, "reading", 2.0)
    assert seconds.reading_seconds(plan, 3000, 64) == pytest.approx(6.0)
    assert seconds.reading_seconds(plan, 1000, 128) > 2.0
    with pytest.raises(rates.Unmeasured):
        seconds.reading_seconds(plan, 1000, 64, "scoring")
    with pytest.raises(rates.Unmeasured):
        seconds.reading_seconds(reestimate(plan, precision="int8"), 1000, 64)


def test_an_answer_teaches_reading_and_writing(session):
    receipt = last(session.generate(TEXT[:90], GenerateOptions(greedy=True, max_new_tokens=9), raw=True))
    tokens = receipt.new_tokens - 1
    assert seconds.writing_seconds(session.plan, tokens) == pytest.approx(tokens / receipt.decode_tps)
    count = receipt.prompt_tokens
    assert seconds.reading_seconds(session.plan, count, count) == pytest.approx(count / receipt.prefill_tps)


def test_a_run_that_takes_long_says_so_first():
    events = list(timed([Step(1, 2, "on")], "compare", 100.0))
    assert events[0].note == "Expected to take 1 to 3 min"
    assert len(list(timed([Step(1, 2, "on")], "compare", 5.0))) == 1


@pytest.mark.real
def test_a_comparison_is_predicted_once_it_was_made():
    options = MeasureOptions(tokens=256, window=128, stride=64, prompt_tokens=256, new_tokens=32, runs=1)
    variants = [parse_variant("int8")]
    drain(compare("demo", variants, options=options))
    assert total_seconds([(read_spec("demo"), variant) for variant in variants], options, probe(), UNLIMITED, "compare")
