"""The filtered distribution against transformers' own processors, and the draw itself."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowmem.generate.options import Sampling
from lowmem.generate.sampling import NOT_A_TOKEN, filtered_logits, next_tokens, penalized, sample

VOCABULARY = 300


def logits(seed: int = 0, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def reference(scores: torch.Tensor, text: torch.Tensor, options: Sampling) -> torch.Tensor:
    """What `generate` would sample from, its processors in its order."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors(text, scores.clone()).softmax(dim=-1)


@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.3, 3.0])
def test_the_filtered_distribution_is_that_of_transformers(penalty: float) -> None:
    text = torch.randint(0, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1))
    sizes = set()
    grid = itertools.product([0.05, 0.7, 1.0, 5.0], [0, 1, 2, 50, 1000], [0.01, 0.5, 0.95, 1.0], [0.0, 0.05, 0.99])
    for seed, (temperature, top_k, top_p, min_p) in enumerate(grid):
        options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
        scores = logits(seed)
        ours = filtered_logits(penalized(scores, text, penalty), options).softmax(dim=-1)
        theirs = reference(scores, text, options)
        assert torch.equal(ours > 0, theirs > 0), options
        torch.testing.assert_close(ours, theirs)
        sizes.update((ours > 0).sum(dim=-1).tolist())
    assert {1, 2, 50, VOCABULARY} <= sizes


def test_tokens_that_tie_with_the_last_one_kept_stay() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    kept = filtered_logits(scores, Sampling(temperature=1.0, top_k=2, top_p=1.0)).isfinite()
    assert kept.tolist() == [[True, True, True, True, False]]
    assert torch.equal(kept, TopKLogitsWarper(2)(None, scores).isfinite())
    # Their mass counts for top-p: the best token alone has 73 % of the four.
    assert filtered_logits(scores, Sampling(temperature=1.0, top_k=2, top_p=0.7)).isfinite().sum() == 1
    assert filtered_logits(scores, Sampling(temperature=1.0, top_k=2, top_p=0.75)).isfinite().sum() == 4


def test_impossible_tokens_stay_impossible() -> None:
    scores = logits().index_fill(1, torch.arange(10, VOCABULARY), -math.inf)
    for top_k, top_p, min_p in [(50, 0.95, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.1), (0, 1.0, 0.0)]:
        kept = filtered_logits(scores, Sampling(top_k=top_k, top_p=top_p, min_p=min_p)).isfinite()
        assert kept[:, :10].any(dim=1).all()
        assert not kept[:, 10:].any()


def test_the_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    random = Random(0)
    draws = torch.cat([sample(probabilities.log()[None], [random]) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=5) / len(draws)
    assert counts[1] == counts[4] == 0
    torch.testing.assert_close(counts, probabilities, atol=0.03, rtol=0)


class _Fixed(Random):
    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def random(self) -> float:
        return self._value


def test_the_ends_of_the_unit_interval_hit_possible_tokens() -> None:
    scores = torch.full((2, 50_000), -math.inf)
    scores[:, 17:40_000] = 0.0
    assert sample(scores, [_Fixed(0.0), _Fixed(1 - 2**-53)]).tolist() == [17, 39_999]


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    scores = logits(rows=3)
    together = sample(scores, [Random(seed) for seed in (5, 6, 7)])
    assert together.tolist() == [sample(scores[i : i + 1], [Random(5 + i)]).item() for i in range(3)]


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_without_a_finite_best_are_marked(greedy: bool) -> None:
    scores = logits(rows=5)
    scores[1, 3] = math.nan
    scores[2, 3] = math.inf
    scores[3] = -math.inf
    scores[4, 3] = -math.inf
    tokens = next_tokens(scores, torch.zeros(5, 1, dtype=torch.long), Sampling(greedy=greedy), [Random(0)] * 5).tolist()
    assert [token == NOT_A_TOKEN for token in tokens] == [False, True, True, True, False]


def test_nothing_changes_its_input() -> None:
    scores, text = logits(), torch.zeros(4, 2, dtype=torch.long)
    before = scores.clone()
    next_tokens(scores, text, Sampling(repetition_penalty=2.0, min_p=0.1), [Random(0)] * 4)
    assert torch.equal(scores, before)
