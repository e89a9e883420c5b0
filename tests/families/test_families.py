"""A toy of many families at every run of the tests; `python -m tests.families` has all of them and every action."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from families import check, matrix, zoo

FAST = ("plan", "greedy", "batch")
"""Actions of a few seconds together."""

POPULAR = (
    "apertus",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone4",
    "falcon_h1",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "llama",
    "mamba2",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "nemotron_h",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl",
    "smollm3",
)
"""What people load, and one of every mechanism: experts, recurrent layers, shared keys, vision towers, buffers."""


@pytest.fixture(scope="module", params=POPULAR)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[check.Case]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = check.Case(request.param, tmp_path_factory.mktemp(request.param))
    zoo.save(found.kind, found.folder)
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("action", FAST)
def test_the_toy_runs(case: check.Case, action: str) -> None:
    assert check.outcome(case, action) == "ok"


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("axk2", "awq"),  # a stage before stacked experts
        ("axk2", "plan"),  # keys of an indexer in the cache
        ("bamba", "window"),  # the first layer counts no tokens
        ("biogpt", "plan"),  # asks whether its mask hides anything
        ("dbrx", "plan"),  # loops over the experts that were chosen
        ("emu3", "plan"),  # a configuration that must name a padding token
        ("falcon_h1", "packed"),  # a state beside keys and values
        ("qwen3_vl_moe", "int8"),  # stacked experts that are stored transposed
        ("xlstm", "greedy"),  # a cache of its own
    ],
)
def test_what_few_families_need(kind: str, action: str, tmp_path: Path) -> None:
    case = check.Case(kind, tmp_path)
    zoo.save(kind, case.folder)
    assert check.outcome(case, action) == "ok"


def test_every_type_has_a_toy_or_a_reason() -> None:
    assert len(zoo.TYPES) >= 100
    assert not {*zoo.TYPES} & zoo.EXCLUDED.keys()
    assert matrix.ACTIONS.keys() == check.ACTIONS.keys()


def test_the_matrix_names_every_reason_once() -> None:
    cells = {
        "b": dict.fromkeys(matrix.ACTIONS, "ok") | {"awq": "refused: no | for <this>"},
        "a": dict.fromkeys(matrix.ACTIONS, matrix.CANNOT + "ValueError: x"),
    }
    text = matrix.document(cells, {"c": "speech"})
    count = len(matrix.ACTIONS)
    assert f"2 types: {count - 1} of {count} cells run" in text
    assert text.index("| a |") < text.index("| b |")
    assert text.count("1. refused: no \\| for &lt;this>") == 1
    assert f"| b | {' | '.join('refused 1' if name == 'awq' else 'ok' for name in matrix.ACTIONS)} |" in text
    assert "- c: speech" in text


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "granitemoehybrid", "gpt_oss", "nemotron_h"])
def test_hybrids_have_all_their_kinds_of_layers(kind: str) -> None:
    text = zoo.config(kind).get_text_config()
    kinds = getattr(text, "layer_types", None) or text.layers_block_type
    assert len({*kinds}) > 1
