"""What may be recommended: only what can be had from here; and what a stranger may name."""

from __future__ import annotations

import pytest
import toys

from lowmem.errors import LowMemError
from lowmem.models import choices, hub
from lowmem.models.catalog import CATALOG
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session
from lowmem.settings import settings
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Choice, Engine


def refs() -> list[str]:
    return [spec.ref for spec in choices.choices()]


def test_without_the_hub_only_the_demo_can_be_had():
    assert not hub.reachable()
    assert refs() == ["demo"]


def test_a_recommendation_without_the_hub_says_why_it_is_so_small(monkeypatch):
    """135 million parameters are not the best that fits 20 GB."""
    reason = Engine().plan(Choice()).reason
    assert "The hub is switched off (HF_HUB_OFFLINE), so the choice is among SmolLM2-135M-Instruct." in reason
    assert Session().plan_for(None, Goal()).reason == reason
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert "hub" not in Engine().plan(Choice()).reason


@pytest.mark.usefixtures("online")
def test_a_hub_out_of_reach_is_the_reason(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert choices.shortage().startswith("The hub cannot be reached, so the choice is among SmolLM2")


def test_with_the_hub_the_best_comes_first_and_no_licence_is_in_the_way(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    quality = {entry.ref: entry.quality for entry in CATALOG}
    gated = {entry.ref for entry in CATALOG if entry.gated}
    assert len(refs()) > 10
    assert [quality[ref] for ref in refs()] == sorted((quality[ref] for ref in refs()), reverse=True)
    assert not gated & set(refs())


@pytest.mark.usefixtures("online")
def test_a_hub_that_refuses_the_connection_is_not_reachable(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
def test_a_hub_that_comes_back_is_seen_after_a_while_and_is_not_asked_in_between(monkeypatch):
    answers, now = [False, False, True], 1000.0
    monkeypatch.setenv("HF_ENDPOINT", "http://a.hub")
    monkeypatch.setattr(hub, "_answers", lambda endpoint: answers.pop(0))
    monkeypatch.setattr(hub.time, "monotonic", lambda: now)
    assert [hub.reachable(), hub.reachable()] == [False, False]
    assert len(answers) == 2
    now += hub.RETRY_SECONDS + 1
    assert not hub.reachable()
    now += hub.RETRY_SECONDS + 1
    assert [hub.reachable(), hub.reachable()] == [True, True]
    assert answers == []


def test_a_stranger_cannot_name_a_folder_of_the_machine(tmp_path):
    folder = toys.save_toy("llama", tmp_path / "private")
    assert Engine().plan(Choice(model=str(folder))).spec.layers == 2
    for ref in (str(folder), f"{folder}/../private", "/etc", "../../etc/passwd", "~/models"):
        with pytest.raises(LowMemError):
            Engine(access=Access(public=True)).plan(Choice(model=ref))


def test_a_stranger_may_use_the_models_that_were_fetched_and_not_what_the_owner_made():
    folder = toys.save_toy("llama", settings().models / "fetched")
    assert Engine(access=Access(public=True)).plan(Choice(model=str(folder))).spec.layers == 2
    folder = toys.save_toy("llama", settings().outputs / "mine")
    with pytest.raises(LowMemError):
        Engine(access=Access(public=True)).plan(Choice(model=str(folder)))
