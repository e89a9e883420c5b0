"""Perplexity and divergence against naive references on toys, and what ends them."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import toys

from lowmem.errors import BadInput, Cancelled, CorruptModel, DiskFull
from lowmem.events import CancelToken, Receipt, Step, drain
from lowmem.measure import divergence as divergence_module
from lowmem.measure.divergence import divergence, reference_bytes, write_reference
from lowmem.measure.perplexity import Perplexity, perplexity
from lowmem.measure.scoring import score
from lowmem.measure.speed import measure_speed
from lowmem.measure.windows import Passage, Window, passage

NO_CANCEL = CancelToken()


def measured(model, read: Passage) -> Perplexity:
    return drain(perplexity(model, read, cancel=NO_CANCEL))


@torch.no_grad()
def naive_rows(model, read: Passage) -> list[tuple[int, torch.Tensor]]:
    """(target, float64 log-probabilities [vocab]) of every scored token, its context cut out and run by itself."""
    rows = []
    for window in read.windows():
        for at in range(window.first, window.end):
            context = torch.tensor([[*read.prefix, *read.ids[window.start : at]]])
            rows.append((read.ids[at], model(context).logits[0, -1].double().log_softmax(-1)))
    return rows


def test_the_windows_are_those_of_the_documented_method():
    # transformers' loop, by hand: begin 0, 3, 6; each ends 8 later or at the end.
    assert list(Passage(tuple(range(12)), window=8, stride=3).windows()) == [
        Window(0, 8, 1),
        Window(3, 11, 8),
        Window(6, 12, 11),
    ]


@pytest.mark.parametrize("prefix", [(), (257,)])
@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 3), (8, 8, 7), (9, 8, 1), (50, 8, 7), (50, 16, 5), (50, 64, 1)]
)
def test_every_token_is_scored_once_with_enough_context(length, window, stride, prefix):
    read = Passage(tuple(range(length)), window, stride, prefix)
    windows = list(read.windows())
    scored = [at for part in windows for at in range(part.first, part.end)]
    assert scored == list(range(0 if prefix else 1, length))
    assert len(scored) == read.scored
    for number, part in enumerate(windows):
        assert part.end - part.start + len(prefix) <= window
        context = len(prefix) + part.first - part.start
        assert context >= (window - stride if number else 1)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "words"),
    [
        ((1, 2, 3), 8, 8, "stride of 8"),
        ((1, 2, 3), 8, 0, "stride of 0"),
        ((1, 2, 3), 1, 1, "stride of 1"),
        ((1,), 8, 4, "1 tokens"),
        ((), 8, 4, "0 tokens"),
    ],
)
def test_windows_that_make_no_sense_are_refused(ids, window, stride, words):
    with pytest.raises(BadInput, match=words) as caught:
        Passage(ids, window, stride)
    assert caught.value.hint


@pytest.mark.parametrize("prefix", [(), (toys.BOS,)])
@pytest.mark.parametrize("name", toys.NAMES)
def test_perplexity_equals_the_naive_one(name, prefix):
    read = Passage(tuple(toys.prompt(40)), 16, 7, prefix)
    total = measured(toys.toy(name), read)
    rows = naive_rows(toys.toy(name), read)
    assert total.tokens == len(rows) == read.scored
    assert total.nll == pytest.approx(-sum(row[target].item() for target, row in rows), rel=1e-5)
    assert total.value == pytest.approx(math.exp(total.nll / total.tokens))


def test_a_window_as_long_as_the_text_is_one_pass():
    model, ids = toys.toy("llama"), toys.prompt(60)
    tensor = torch.tensor([ids])
    with torch.no_grad():
        loss = model(input_ids=tensor, labels=tensor).loss.item()
    for window in (60, 61, 1000):
        assert measured(model, Passage(tuple(ids), window, 10)).value == pytest.approx(math.exp(loss), rel=1e-5)


def test_slabs_bound_the_logits_and_change_nothing():
    model, read = toys.toy("llama"), Passage(tuple(toys.prompt(50)), 32, 16)
    seen: list[int] = []
    watcher = SimpleNamespace(add=lambda segment: seen.append(len(segment.log_probs)))
    total = Perplexity()
    list(score(model, read, [total, watcher], cancel=NO_CANCEL, segment_bytes=5 * 4 * toys.VOCABULARY))
    assert max(seen) == 5
    assert sum(seen) == read.scored
    assert total.nll == pytest.approx(measured(model, read).nll, rel=1e-6)


def test_the_decoder_runs_once_a_window_and_is_left_as_it_was():
    model, read = toys.fresh("llama"), Passage(tuple(toys.prompt(50)), 32, 16)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    list(score(model, read, [], cancel=NO_CANCEL, segment_bytes=1))
    assert len(calls) == len(list(read.windows()))
    assert "forward" not in vars(model.model)


def test_a_family_that_takes_its_decoder_apart_is_measured_all_the_same(monkeypatch):
    model, read = toys.fresh("llama"), Passage(tuple(toys.prompt(30)), 16, 8)
    expected = measured(model, read).nll
    monkeypatch.setattr(type(model), "base_model", property(lambda self: self))
    assert measured(model, read).nll == pytest.approx(expected, rel=1e-6)


def test_the_tokenizers_own_beginning_is_in_every_window():
    tokenizer = toys.tokenizer()
    plain = passage(tokenizer, "abcdef", tokens=4, window=8, stride=4)
    assert (plain.ids, plain.prefix) == (tuple(b"abcd"), ())

    class WithBeginning:
        bos_token_id = toys.BOS

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [toys.BOS] * add_special_tokens + list(text.encode())}

    assert passage(WithBeginning(), "abc", tokens=9, window=8, stride=4) == Passage(tuple(b"abc"), 8, 4, (toys.BOS,))


@pytest.fixture
def reference(tmp_path):
    """The toy's predictions on a passage, in a file."""
    read, path = Passage(tuple(toys.prompt(60)), 32, 16), tmp_path / "reference.bin"
    total = drain(write_reference(toys.toy("llama"), read, path, cancel=NO_CANCEL))
    assert total.nll == pytest.approx(measured(toys.toy("llama"), read).nll)
    return read, path


def test_a_model_does_not_diverge_from_itself(reference):
    read, path = reference
    total, compared = drain(divergence(toys.toy("llama"), read, path, cancel=NO_CANCEL))
    assert abs(compared.kl / compared.tokens) < 1e-6
    assert 0 <= compared.mean < 1e-6
    assert compared.agreement == 1.0
    assert compared.tokens == total.tokens == read.scored


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.3])
def test_divergence_equals_the_naive_one(reference, noise):
    read, path = reference
    other = toys.fresh("llama")
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    total, compared = drain(divergence(other, read, path, cancel=NO_CANCEL))
    pairs = list(zip(naive_rows(toys.toy("llama"), read), naive_rows(other, read), strict=True))
    exact = sum((p.exp() * (p - q)).sum().item() for (_, p), (_, q) in pairs) / len(pairs)
    agreed = sum(int(p.argmax() == q.argmax()) for (_, p), (_, q) in pairs) / len(pairs)
    ratio = sum((p.exp() * (p - q).abs()).sum().item() for (_, p), (_, q) in pairs) / len(pairs)
    assert compared.mean == pytest.approx(exact, abs=5e-4 * ratio + 1e-6)
    assert compared.agreement == pytest.approx(agreed)
    assert total.nll == pytest.approx(measured(other, read).nll)


def test_the_file_of_the_original_has_the_size_that_was_said(reference):
    read, path = reference
    header = len(path.read_bytes().split(b"\n", 1)[0]) + 1
    assert path.stat().st_size == header + reference_bytes(read.scored, toys.VOCABULARY)


@pytest.mark.parametrize(
    "other", [Passage(tuple(toys.prompt(60, seed=1)), 32, 16), Passage(tuple(toys.prompt(60)), 32, 8)]
)
def test_another_text_or_other_windows_are_not_compared(reference, other):
    with pytest.raises(BadInput, match="differently"):
        list(divergence(toys.toy("llama"), other, reference[1], cancel=NO_CANCEL))


def test_another_vocabulary_is_not_compared(reference):
    read, path = reference
    model = toys.fresh("llama")
    model.resize_token_embeddings(300)
    with pytest.raises(BadInput, match="300 tokens, but the reference's has 260"):
        list(divergence(model, read, path, cancel=NO_CANCEL))


def test_no_room_for_the_original(tmp_path, monkeypatch):
    monkeypatch.setattr(divergence_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    read = Passage(tuple(toys.prompt(20)), 16, 8)
    with pytest.raises(DiskFull, match=r"take 9\.96 KB, but only 100 B of disk space is free"):
        list(write_reference(toys.toy("llama"), read, tmp_path / "reference.bin", cancel=NO_CANCEL))
    assert not list(tmp_path.iterdir())


def test_stop_within_a_pass_leaves_no_file_that_looks_whole(tmp_path):
    model, cancel = toys.fresh("llama"), CancelToken()
    model.model.layers[1].register_forward_pre_hook(lambda *_: cancel.set())
    with pytest.raises(Cancelled):
        list(write_reference(model, Passage(tuple(toys.prompt(20)), 16, 8), tmp_path / "reference.bin", cancel=cancel))
    assert not (tmp_path / "reference.bin").exists()
    assert not any(module._forward_pre_hooks for module in model.model.layers[0].modules())


def test_numbers_that_are_not_numbers():
    model = toys.fresh("llama")
    model.lm_head.weight[7] = math.nan
    with pytest.raises(CorruptModel, match="NaN"):
        measured(model, Passage(tuple(toys.prompt(20)), 16, 8))


def test_progress_ends_with_the_text():
    steps = list(perplexity(toys.toy("gpt2"), Passage(tuple(toys.prompt(50)), 16, 8), cancel=NO_CANCEL))
    assert [step.done for step in steps] == [0, 16, 24, 32, 40, 48, 50]
    assert all(step.total == 50 and step.unit == "tokens" for step in steps)


class FakeSession:
    """Answers with receipts of known speeds."""

    def __init__(self, speeds):
        self.speeds = iter(speeds)

    def generate(self, prompt, options, cancel, raw):
        assert raw
        assert options.greedy
        prefill, decode = next(self.speeds)
        yield Receipt(
            "generate", "toy", "fp32", "cpu", 1.0, prompt_tokens=5, new_tokens=3, prefill_tps=prefill, decode_tps=decode
        )


def test_speed_is_the_median_of_the_sessions_receipts():
    steps: list[Step] = []
    speed = drain(measure_speed(FakeSession([(10, 1), (400, 3), (30, 2)]), "Hello", runs=3), steps.append)
    assert (speed.prefill_tps, speed.decode_tps, speed.prompt_tokens, speed.new_tokens) == (30, 2, 5, 3)
    assert [step.done for step in steps] == [0, 1, 2, 3]


def test_speed_stops_between_runs():
    cancel = CancelToken()
    steps = measure_speed(FakeSession([(1, 1)] * 3), "Hello", cancel=cancel)
    next(steps)
    cancel.set()
    with pytest.raises(Cancelled):
        next(steps)
