"""Pages that strangers open by the thousand: each costs kilobytes, and their number ends."""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from ui_stub import StubEngine, close

from lowmem.ui import sessions
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui

PAGES = 150


@pytest.fixture(scope="module")
def page() -> Iterator[tuple[gr.Blocks, str]]:
    demo = build_ui(StubEngine())
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield demo, url
    close(demo)


def refresh(page: tuple[gr.Blocks, str], session: str) -> list[Any]:
    """What an open page sends every two seconds."""
    demo, url = page
    tick = next(one for one in demo.fns.values() if any(event == "tick" for _, event in one.targets))
    body = {"fn_index": tick._id, "data": [None], "session_hash": session}
    answer = httpx.post(f"{url}gradio_api/run/predict", json=body, timeout=60)
    return list(answer.raise_for_status().json()["data"])


def test_a_new_page_takes_kilobytes(page: tuple[gr.Blocks, str]) -> None:
    for _ in range(20):
        refresh(page, secrets.token_hex(6))
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(PAGES):
        refresh(page, secrets.token_hex(6))
    gc.collect()
    assert psutil.Process().memory_info().rss - before < PAGES * 100e3


def test_pages_do_not_see_what_another_was_shown(page: tuple[gr.Blocks, str]) -> None:
    demo, _ = page
    refresh(page, "one")
    one, other = demo.state_holder["one"], demo.state_holder["other"]
    changed = [key for key in demo.default_config.blocks if one.blocks_config.blocks[key] is not demo.blocks[key]]
    assert changed  # the updates that the refresh returned
    assert all(other.blocks_config.blocks[key] is demo.blocks[key] for key in demo.default_config.blocks)
    seen = next(key for key, block in demo.blocks.items() if isinstance(block, gr.State) and key in one.state_data)
    assert one[seen] != demo.blocks[seen].value
    assert other[seen] == demo.blocks[seen].value


def test_the_number_of_pages_ends(page: tuple[gr.Blocks, str], monkeypatch: pytest.MonkeyPatch) -> None:
    demo, _ = page
    assert demo.state_holder.capacity == sessions.CAPACITY
    monkeypatch.setattr(sessions, "MOST_CLOSED", 3)
    demo.state_holder.session_data.clear()
    unread = demo._queue.pending_messages_per_session
    for number in range(10):
        unread[f"page {number}"] = asyncio.Queue()
        demo.state_holder[f"page {number}"].is_closed = number < 8
    assert list(demo.state_holder.session_data) == [*(f"page {number}" for number in range(5, 8)), "page 8", "page 9"]
    assert set(demo.state_holder.session_data) == {name for name in unread if name.startswith("page ")}
    monkeypatch.setattr(demo.state_holder, "capacity", 4)
    demo.state_holder["new"]
    demo.state_holder["newer"]
    assert len(demo.state_holder.session_data) <= 5
