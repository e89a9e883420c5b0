"""From logits to the next token: pure functions on float32 logits [rows, vocab].

The steps and their order are those of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p. The
last three each keep the tokens above some logit, so they are applied as one threshold per row; tokens that tie with the
last one kept are kept as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from lowmem.generate.options import Sampling

NOT_A_TOKEN = -1
"""Marks a row whose largest logit is NaN or infinite."""


def next_tokens(logits: Tensor, text: Tensor, options: Sampling, randoms: Sequence[Random]) -> Tensor:
    """The next token of every row, int64 [rows]; `NOT_A_TOKEN` where the logits are NaN or infinite.

    Args:
        logits: float32 [rows, vocab]; entries may be -inf, but not all of a row.
        text: int64 [rows, tokens], the tokens so far, for the repetition penalty.
        randoms: one random generator per row; unused if greedy.
    """
    if options.repetition_penalty != 1.0:
        logits = penalized(logits, text, options.repetition_penalty)
    # The mark is returned with the tokens, so that the host waits for the GPU only once.
    usable = logits.amax(dim=-1).isfinite()
    tokens = logits.argmax(dim=-1) if options.greedy else sample(filtered_logits(logits, options), randoms)
    return torch.where(usable, tokens, NOT_A_TOKEN)


def penalized(logits: Tensor, text: Tensor, penalty: float) -> Tensor:
    """Make every token of `text` [rows, tokens] less likely by `penalty` > 1 (CTRL, arXiv 1909.05858).

    The penalty does not depend on how often a token occurs.
    """
    scores = logits.gather(1, text)
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(1, text, scores)


def filtered_logits(logits: Tensor, options: Sampling) -> Tensor:
    """Logits over temperature, with -inf for tokens that top-k, top-p (arXiv 1904.09751) or min-p drop."""
    scaled = logits / options.temperature
    if options.top_k == 0 and options.top_p >= 1.0:
        return _cut(scaled, scaled.amax(dim=-1, keepdim=True) + math.log(options.min_p)) if options.min_p else scaled
    best = _best(scaled, options.top_k)
    lowest = best[:, -1:]
    if options.top_p < 1.0:
        # Over all tokens that top-k keeps, including those that tie with its last one.
        total = _cut(scaled, lowest).logsumexp(dim=-1, keepdim=True)
        probabilities = (best - total).exp_()
        above = probabilities.cumsum(dim=-1) - probabilities
        lowest = best.masked_fill(above >= options.top_p, math.inf).amin(dim=-1, keepdim=True)
    if options.min_p:
        lowest = torch.maximum(lowest, best[:, :1] + math.log(options.min_p))
    return _cut(scaled, lowest)


def sample(logits: Tensor, randoms: Sequence[Random]) -> Tensor:
    """Sample one token per row, int64 [rows], with one random number from the row's own generator.

    A row's token therefore depends neither on the other rows nor on the device.
    """
    # float64: in float32 the sum over a large vocabulary could round a draw past the last token.
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=precision)
    draws = torch.tensor([random.random() for random in randoms], dtype=precision).to(logits.device)
    targets = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _best(scaled: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest values of each row (all if 0), in descending order."""
    if 0 < top_k < scaled.shape[-1]:
        return scaled.topk(top_k, dim=-1).values
    return scaled.sort(dim=-1, descending=True).values


def _cut(scaled: Tensor, lowest: Tensor) -> Tensor:
    return scaled.masked_fill(scaled < lowest, -math.inf)
