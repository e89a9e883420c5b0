"""The KV cache reaches the model under the name that its `forward` declares, without a deprecation warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from toys import NAMES, prompt, toy

from lowmem.export.generic import FlatCache
from lowmem.generate.cache.rotary import _probe
from lowmem.generate.options import GenerateOptions
from lowmem.generate.rows import Rows
from lowmem.longctx.reading import Reader
from lowmem.models.cache_argument import cache_argument


def test_the_declared_name_is_chosen() -> None:
    class New:
        def forward(self, cache: object = None) -> None: ...

    class Old:
        def forward(self, past_key_values: object = None) -> None: ...

    assert cache_argument(New()) == "cache"
    assert cache_argument(Old()) == "past_key_values"


@pytest.mark.parametrize("name", NAMES)
def test_no_pass_warns(name: str) -> None:
    model = toy(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        rows = Rows(model, [prompt(8)], GenerateOptions(max_new_tokens=8))
        rows.logits(0, rows.length)
        list(Reader(model, prompt(8), GenerateOptions()).read(7))
        _probe(model)
        if rows.can_crop:
            rows.draft_logits([1])


def test_the_exported_wrapper_does_not_warn() -> None:
    model = toy("llama")
    shape = model.config
    past = [torch.zeros(1, shape.num_key_value_heads, 2, shape.head_dim) for _ in range(2 * shape.num_hidden_layers)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        _, *present = FlatCache(model)(
            torch.ones(1, 3, dtype=torch.long), torch.ones(1, 5), torch.arange(2, 5)[None], past
        )
    assert [tensor.shape[2] for tensor in present] == [5] * len(past)
