"""Lookahead: the same text in fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from lowmem.events import CancelToken
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompt_lookup import CLOSE, PromptLookup, accepted
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.model import OnnxModel


def written(model: Any, prompt: list[int], eos: frozenset[int] = frozenset(), **options: Any) -> tuple[list[Any], int]:
    """Tokens, and passes of the model."""
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    chosen = GenerateOptions(greedy=True, max_new_tokens=60, **options)
    try:
        events = list(decode(model, [prompt], chosen, eos_ids=eos, cancel=CancelToken()))
    finally:
        handle.remove()
    return [event.ids for event in events if isinstance(event, Tokens)], len(passes)


@pytest.fixture(scope="module")
def repeating() -> Any:
    """A toy whose blocks add nothing: a token depends on the one before it alone, so every text ends in a circle."""
    model = toys.fresh("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    return model


@pytest.fixture(scope="module")
def graph(repeating: Any, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    root = tmp_path_factory.mktemp("graph")
    repeating.save_pretrained(root / "m")
    toys.tokenizer().save_pretrained(root / "m")
    list(export_model(ExportRequest(str(root / "m"), root / "out", ExportOptions(precision="fp32"))))
    return OnnxModel(root / "out")


@pytest.mark.parametrize("kind", ["torch", "graph"])
def test_the_text_stays_and_the_passes_become_fewer(kind: str, repeating: Any, graph: OnnxModel) -> None:
    model = graph if kind == "graph" else repeating
    plain, passes = written(model, toys.prompt(12))
    ahead, fewer = written(model, toys.prompt(12), prompt_lookup_num_tokens=8)
    assert ahead == plain
    assert fewer < 0.7 * passes


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])
def test_wrong_guesses_leave_no_trace(family: str) -> None:
    model = toys.toy(family)
    for seed in range(4):
        prompt = toys.prompt(12, seed=seed) * 3
        assert written(model, prompt, prompt_lookup_num_tokens=8)[0] == written(model, prompt)[0]


def test_activations_that_are_rounded_rule_it_out(repeating: Any, tmp_path: Path) -> None:
    repeating.save_pretrained(tmp_path / "m")
    toys.tokenizer().save_pretrained(tmp_path / "m")
    list(export_model(ExportRequest(str(tmp_path / "m"), tmp_path / "out", ExportOptions(precision="int8"))))
    graph = OnnxModel(tmp_path / "out")
    assert written(graph, toys.prompt(12), prompt_lookup_num_tokens=8)[1] == written(graph, toys.prompt(12))[1]


def test_the_end_of_the_text_ends_it(graph: OnnxModel) -> None:
    prompt = toys.prompt(12) * 3
    plain, _ = written(graph, prompt)
    eos = frozenset(plain[20])
    assert written(graph, prompt, eos, prompt_lookup_num_tokens=8)[0] == written(graph, prompt, eos)[0]


@pytest.mark.parametrize(
    "other", [{"greedy": False}, {"num_return_sequences": 2}, {"window": 32}, {"repetition_penalty": 1.2}]
)
def test_where_it_could_change_a_word_it_does_nothing(other: dict[str, Any]) -> None:
    def answer(prompt_lookup_num_tokens: int) -> list[Any]:
        options = GenerateOptions(
            **{"greedy": True, "seed": 1, "max_new_tokens": 12, "prompt_lookup_num_tokens": prompt_lookup_num_tokens}
            | other
        )
        prompt = toys.prompt(8) * 3
        return list(decode(toys.toy("llama"), [prompt], options, eos_ids=frozenset(), cancel=CancelToken()))

    assert answer(8) == answer(0)


def test_guesses_are_what_followed_the_longest_run() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 8)
    assert lookup.draft(9) == [4, 9]
    lookup.adapt(2)
    assert lookup.draft(9) == [4, 9, 2, 3]
    assert lookup.draft(1) == [4]
    lookup.add([7])
    assert lookup.draft(9) == []


def test_close_choices_are_left_to_a_pass_of_their_own() -> None:
    logits = torch.tensor([[0.0, 9, 0], [9, 0, 0], [9 - CLOSE / 2, 9, 0], [0, 0, 9]])
    choices = logits.argmax(-1).tolist()
    assert accepted(logits, choices, [1, 0, 1]) == [1, 0]
    assert accepted(logits, choices, [1, 2, 1]) == [1, 0]
    assert accepted(logits[2:3], choices[2:3], []) == [1]
