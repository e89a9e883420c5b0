"""A short run of `faults.load`: visitors of a public page, through one address and through many."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import load

VISITORS, SECONDS = 10, 18.0


@pytest.mark.parametrize("addresses", ["one", "many"])
def test_many_visitors_are_served_fairly_and_get_their_own_answers(addresses: str, tmp_path: Path) -> None:
    report = load.run(VISITORS, SECONDS, addresses, tmp_path)
    print(report)
    assert report.faults == []
    assert sum(report.answers) > VISITORS
    assert set(report.acts) >= {"chats", "plans", "chats_on_the_page", "uploads", "stops", "leaves"}
