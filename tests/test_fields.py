"""Options from loose values: what is taken, what is refused, and how the refusal reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from lowmem.errors import BadInput
from lowmem.fields import build, changed, describe, option
from lowmem.generate.options import GenerateOptions, Sampling


@dataclass(frozen=True, slots=True)
class Options:
    count: int = option(3, "Count", "How many.", low=1, high=10, step=1)
    share: float = option(0.5, "Share", "How much.", low=0.0)
    on: bool = option(False, "On", "Whether.")
    mode: str = option("a", "Mode", "Which.", choices=("a", "b"))
    names: tuple[str, ...] = option((), "Names", "Who.")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Options()),
        ({"count": "7", "share": "0.25"}, Options(count=7, share=0.25)),
        ({"count": 4.0}, Options(count=4)),
        ({"on": "Yes"}, Options(on=True)),
        ({"on": 1}, Options(on=True)),
        ({"mode": "b"}, Options(mode="b")),
        ({"names": "x"}, Options(names=("x",))),
        ({"names": ["x", "y"]}, Options(names=("x", "y"))),
        ({"count": 1}, Options(count=1)),
        ({"count": 10}, Options(count=10)),
    ],
)
def test_build(values: dict[str, Any], expected: Options) -> None:
    built = build(Options, values)
    assert built == expected
    assert [type(value) for value in dataclasses.astuple(built)] == [int, float, bool, str, tuple]


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"count": 0}, "Count is 0.", "Use a value from 1 to 10."),
        ({"count": 11}, "Count is 11.", "Use a value from 1 to 10."),
        ({"count": 2.5}, "Count: 2.5 is not a whole number.", "Use a value from 1 to 10."),
        ({"count": True}, "Count: True is not a whole number.", ""),
        ({"count": None}, "Count: None is not a whole number.", ""),
        ({"count": "many"}, "Count: 'many' is not a whole number.", ""),
        ({"count": float("inf")}, "Count: inf is not a whole number.", ""),
        ({"count": 10**400}, "Count", ""),
        ({"share": float("nan")}, "Share is nan.", "Use 0 or more."),
        ({"share": float("inf")}, "Share is inf.", "Use 0 or more."),
        ({"share": -0.1}, "Share is -0.1.", "Use 0 or more."),
        ({"share": [1]}, "Share: [1] is not a number.", ""),
        ({"on": "maybe"}, "On: 'maybe' is not yes or no.", ""),
        ({"on": 0.5}, "On: 0.5 is not yes or no.", ""),
        ({"mode": "c"}, "Mode: there is no 'c'.", "Choose one of a, b."),
        ({"mode": 1}, "Mode: 1 is not text.", "Choose one of a, b."),
        ({"names": [1]}, "Names: [1] is not a list of texts.", ""),
        ({"names": 3}, "Names: 3 is not a list of texts.", ""),
        ({"colour": "red"}, "There is no option 'colour'.", "count, share, on, mode, names"),
    ],
)
def test_build_refuses(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        build(Options, values)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(BadInput) as caught:
        build(Options, {"count": "9" * 5000 + "x"})
    assert len(caught.value.message) < 100


def test_every_generation_option_explains_itself_and_its_default_is_valid() -> None:
    assert build(GenerateOptions, dataclasses.asdict(GenerateOptions())) == GenerateOptions()
    for one in describe(GenerateOptions):
        assert one.label, one.name
        assert one.help.endswith("."), one.name


@dataclass(frozen=True, slots=True)
class Renamed:
    new_name: int = option(1, "Name", "Renamed.", aliases=("old_name",))


def test_an_earlier_name_still_works_and_says_the_new_one(caplog: pytest.LogCaptureFixture) -> None:
    assert build(Renamed, {"old_name": 5}) == Renamed(new_name=5)
    assert [record.getMessage() for record in caplog.records] == [
        "The option 'old_name' is now called 'new_name'; the old name will be removed."
    ]
    assert build(Renamed, {"new_name": 5}) == Renamed(new_name=5)
    assert len(caplog.records) == 1


def test_what_is_left_open_is_the_models_choice() -> None:
    """The person's choice, else what generation_config.json says, moved into the range, else the usual."""
    model = {
        "temperature": 1e-6,
        "top_k": 20,
        "top_p": "high",
        "min_p": None,
        "repetition_penalty": 1.1,
        "eos_token_id": 2,
    }
    found = build(GenerateOptions, {"top_k": 7, "temperature": None}).sampling(model)
    assert found == Sampling(temperature=0.05, top_k=7, top_p=0.95, min_p=0.0, repetition_penalty=1.1)
    assert GenerateOptions().sampling({}) == Sampling()
    assert changed(GenerateOptions(temperature=0.7)) == {"temperature": 0.7}  # a choice, though it is the usual
    assert changed(GenerateOptions()) == {}
