"""Sliding hidden states against single passes over whole texts and over each token's own window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_generate_cache_window import other
from toys import prompt, toy

from lowmem.errors import BadInput, Cancelled, DiskFull
from lowmem.events import CancelToken, Step, drain
from lowmem.longctx import hidden
from lowmem.longctx.hidden import Written, hidden_states
from lowmem.measure.windows import cut


def run(*args: Any, **kwargs: Any) -> Written:
    steps: list[Any] = []
    written = drain(hidden_states(*args, **kwargs), steps.append)
    assert all(isinstance(step, Step) for step in steps)
    return written


def one_pass(name: str, ids: list[int], layer: int = -1) -> torch.Tensor:
    with torch.inference_mode():
        return (
            toy(name)
            .base_model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
            .hidden_states[layer][0]
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_window_as_long_as_the_text_is_one_pass_exactly(name: str, tmp_path: Path) -> None:
    ids = prompt(100)
    written = run(toy(name), [ids], 128, 64, tmp_path / "states.npy")
    assert written.shape == (100, 64)
    assert np.array_equal(np.load(tmp_path / "states.npy", mmap_mode="r"), one_pass(name, ids).numpy())


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 32), (30, 7), (64, 1)])
def test_every_state_is_that_of_its_own_window_with_enough_in_front(window: int, stride: int, tmp_path: Path) -> None:
    ids = prompt(201)
    run(toy("llama"), [ids], window, stride, tmp_path / "states.npy")
    got = torch.from_numpy(np.load(tmp_path / "states.npy"))
    for part in cut(len(ids), window, stride):
        expected = one_pass("llama", ids[part.start : part.end])[part.first - part.start :]
        torch.testing.assert_close(got[part.first : part.end], expected, atol=1e-5, rtol=1e-5)
        assert part.start == 0 or part.first - part.start >= window - stride


def test_windows_reach_every_token_once() -> None:
    for length in (1, 31, 32, 33, 64, 100):
        places = [place for part in cut(length, 32, 10) for place in range(part.first, part.end)]
        assert places == list(range(length))


def test_layers_and_texts_of_unequal_lengths(tmp_path: Path) -> None:
    texts = [prompt(70), prompt(3, 1), prompt(40, 2)]
    written = run(toy("llama"), texts, 32, 16, tmp_path / "states.safetensors", layers=(0, 1, -1))
    assert (written.layers, written.offsets) == ((0, 1, 2), (0, 70, 73, 113))
    stored = load_file(tmp_path / "states.safetensors")
    assert {name: tuple(states.shape) for name, states in stored.items()} == {f"layer_{n}": (113, 64) for n in range(3)}
    for layer in range(3):
        torch.testing.assert_close(
            stored[f"layer_{layer}"][70:73], one_pass("llama", texts[1], layer), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            stored[f"layer_{layer}"][73 : 73 + 32], one_pass("llama", texts[2][:32], layer), atol=1e-5, rtol=1e-5
        )


def test_families_that_name_their_context_otherwise(tmp_path: Path) -> None:
    model, ids = other("BloomConfig", n_layer=2, n_head=4, seq_length=512), prompt(60)
    run(model, [ids, ids[:5]], 64, 32, tmp_path / "states.npy")
    with torch.inference_mode():
        expected = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "states.npy")[:60], expected, atol=1e-5)
    with pytest.raises(BadInput, match="the model's 512 positions"):
        run(model, [ids], 513, 8, tmp_path / "more.npy")


def test_several_layers_in_one_array(tmp_path: Path) -> None:
    assert run(toy("llama"), [prompt(20)], 16, 8, tmp_path / "states.npy", layers=(0, 2)).shape == (2, 20, 64)
    assert np.load(tmp_path / "states.npy").shape == (2, 20, 64)


@pytest.mark.parametrize(
    ("texts", "window", "stride", "name", "layers", "message"),
    [
        ([[]], 16, 8, "s.npy", (-1,), "The text is empty."),
        ([[1]], 16, 17, "s.npy", (-1,), "A stride of 17 does not work with windows of 16 tokens"),
        (
            [[1]],
            513,
            8,
            "s.npy",
            (-1,),
            "A window of 513 tokens exceeds the model's 512 positions.",
        ),
        ([[1]], 16, 8, "s.bin", (-1,), "s.bin is neither"),
        ([[1]], 16, 8, "s.npy", (3,), "There is no layer 3."),
        ([[1]], 16, 8, "none/s.npy", (-1,), "There is no folder"),
    ],
)
def test_what_cannot_be_is_refused_with_its_number(
    texts: Any, window: int, stride: int, name: str, layers: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        run(toy("llama"), texts, window, stride, tmp_path / name, layers=layers)


def test_stop_and_full_disks_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = CancelToken()
    steps = hidden_states(toy("llama"), [prompt(5000)], 16, 8, tmp_path / "states.npy", cancel=cancel)
    next(steps), next(steps)
    cancel.set()
    with pytest.raises(Cancelled):
        list(steps)
    monkeypatch.setattr(hidden, "disk_free_bytes", lambda _folder: 1000)
    with pytest.raises(DiskFull, match=r"take 25\.6 KB, but only 1\.00 KB"):
        run(toy("llama"), [prompt(100)], 16, 8, tmp_path / "states.npy")
    assert list(tmp_path.iterdir()) == []
