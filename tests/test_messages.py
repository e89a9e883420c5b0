"""Messages are English texts that can still be translated, wherever they have been."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict

import pytest

from lowmem.errors import DoesNotFit
from lowmem.events import Step
from lowmem.messages import LANGUAGE, Message, join, msg, packed, preferred, translate, unpacked

SPEED = Message("{tokens:,} tokens at {speed:.1f} tok/s", tokens=1234, speed=2.5)


def test_a_message_is_its_english_text() -> None:
    assert SPEED == "1,234 tokens at 2.5 tok/s"
    assert json.dumps({"note": SPEED}) == '{"note": "1,234 tokens at 2.5 tok/s"}'
    assert Message('Write {"prompt": "..."}.') == 'Write {"prompt": "..."}.'
    assert f"{Message('{size:.0%} of {name!r}', size=0.5, name='a')}" == "50% of 'a'"


def test_a_text_of_a_strangers_file_is_cut() -> None:
    sentence = msg("There is no option {name!r}.", name="x" * 100_000)
    assert len(sentence) < 600
    assert sentence.endswith("x...'.")


def test_numbers_take_the_signs_of_the_language() -> None:
    assert translate(SPEED) == "1,234 tokens at 2.5 tok/s"
    assert translate(SPEED, "pt") == "1.234 tokens at 2,5 tok/s"
    assert translate(Message("Peak: {speed}", speed=SPEED), "pt") == "Peak: 1.234 tokens at 2,5 tok/s"
    assert translate("1,234.5 tokens", "pt") == "1,234.5 tokens"  # whoever wrote it: it stays
    token = LANGUAGE.set("pt")
    assert translate(SPEED) == "1.234 tokens at 2,5 tok/s"
    LANGUAGE.reset(token)


@pytest.mark.parametrize(
    "travelled",
    [
        pickle.loads(pickle.dumps(SPEED)),
        copy.deepcopy(SPEED),
        asdict(Step(1, 2, SPEED))["note"],
        json.loads(json.dumps(packed({"step": [1, SPEED]})), object_hook=unpacked)["step"][1],
        str(SPEED),
        pickle.loads(pickle.dumps(DoesNotFit(SPEED))).message,
    ],
)
def test_a_message_keeps_its_key_on_its_way(travelled: str) -> None:
    assert isinstance(travelled, Message)
    assert (travelled, travelled.msgid, travelled.params) == (SPEED, SPEED.msgid, SPEED.params)


def test_messages_in_a_row_stay_messages() -> None:
    assert join(", ", [SPEED, "a {b}"]) == f"{SPEED}, a {{b}}"
    assert translate(join(", ", [SPEED, "a {b}"]), "pt") == "1.234 tokens at 2,5 tok/s, a {b}"
    assert translate("(" + SPEED + ")", "pt") == "(1.234 tokens at 2,5 tok/s)"


@pytest.mark.parametrize(
    ("accept", "language"),
    [
        ("pt-BR,pt;q=0.9,en;q=0.8", "pt"),
        ("en-US,en;q=0.9,pt;q=0.1", "en"),
        ("de, pt;q=0.3", "pt"),
        ("fr", "en"),
        ("", "en"),
    ],
)
def test_a_browser_is_answered_in_its_language(accept: str, language: str) -> None:
    assert preferred(accept) == language
