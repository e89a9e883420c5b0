"""Texts as samples of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys

from lowmem.datasets import texts
from lowmem.errors import BadInput, Offline
from lowmem.quant.calibration import Calibration, overlap_warning, token_samples


def test_samples_are_runs_of_the_head_spread_over_it() -> None:
    samples = token_samples(toys.tokenizer(), Calibration(samples=10, length=64), toys.CONTEXT)
    head = texts.calibration_text().text
    assert len(samples) == 10
    positions = [head.index(toys.tokenizer().decode(sample)) for sample in samples]
    assert all(len(sample) == 64 for sample in samples)
    assert positions == sorted(positions)
    assert positions[-1] - positions[0] > 2000


def test_calibration_and_evaluation_never_share_a_part() -> None:
    samples = token_samples(toys.tokenizer(), Calibration(samples=200, length=64), toys.CONTEXT)
    seen = " ".join(toys.tokenizer().decode(sample) for sample in samples)
    assert not overlap_warning(seen, texts.evaluation_text().text)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("The quick brown fox. " * 50)
    samples = token_samples(toys.tokenizer(), Calibration(str(tmp_path / "mine.txt"), 4, 32), toys.CONTEXT)
    assert toys.tokenizer().decode(samples[0]).startswith("The quick brown fox.")
    with pytest.raises(BadInput, match=r"There is no file .*other.txt"):
        token_samples(toys.tokenizer(), Calibration(str(tmp_path / "other.txt"), 4, 32), toys.CONTEXT)


def test_samples_begin_as_the_tokenizer_begins_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beginning:
        bos_token_id = toys.BOS

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = toys.tokenizer()(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [toys.BOS] * add_special_tokens + ids}

    samples = token_samples(Beginning(), Calibration(samples=3, length=32), toys.CONTEXT)
    assert [(sample[0], len(sample)) for sample in samples] == [(toys.BOS, 32)] * 3


def test_the_hubs_text_without_a_hub_says_what_is_here() -> None:
    with pytest.raises(Offline, match="WikiText-2 has not been downloaded"):
        token_samples(toys.tokenizer(), Calibration("wikitext2", 4, 32), toys.CONTEXT)


def test_too_short_texts_and_too_long_samples_are_refused_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 90)
    with pytest.raises(BadInput, match=r"short.txt has 90 tokens; 4 samples of 32 need 128") as caught:
        token_samples(toys.tokenizer(), Calibration(str(tmp_path / "short.txt"), 4, 32), toys.CONTEXT)
    assert "or 2 samples" in caught.value.hint
    with pytest.raises(BadInput, match=r"Samples of 1,024 tokens do not fit the model's context of 512"):
        token_samples(toys.tokenizer(), Calibration(samples=1, length=1024), toys.CONTEXT)


def test_overlap_is_told_as_a_share() -> None:
    words = [f"word{number}" for number in range(1000)]
    calibration, evaluation = " ".join(words[:600]), " ".join(words[500:])
    assert "18% of the evaluation text" in overlap_warning(calibration, evaluation)
    assert overlap_warning(calibration, " ".join(reversed(words))) == ""
