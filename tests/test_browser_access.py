"""What Lighthouse asks of a page, of every tab, at two sizes, in both themes and languages: with axe-core, which Lighthouse runs too.

Names of all controls, contrast, order of headings and roles come from axe; keyboard order, visible focus and sideways
scroll are tried. Foldable parts are open. Against a stub engine with its model loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_browser import Visit, browser, pytestmark, stub_url  # noqa: F401  fixtures, and what marks this file

axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")

TABS = {
    "generate": ("#modes", ("Chat", "Completion", "Batch")),
    "quantize": ("#quantize-modes", ("Quantize", "Compare", "How it works")),
    "offload": ("", ()),
    "longctx": ("#longctx-modes", None),
    "export": ("", ()),
}
LOOKS = [("light", "en-US"), ("dark", "pt-BR")]
"""Both themes and both languages: Portuguese words are longer."""
AXE = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]},
    "resultTypes": ["violations"],
}

FOCUSED = """() => {
    const one = document.activeElement, box = one.getBoundingClientRect(), style = getComputedStyle(one);
    const ring = (node) => {
        const look = getComputedStyle(node);
        return (parseFloat(look.outlineWidth) > 0 && look.outlineStyle !== 'none') || look.boxShadow !== 'none';
    };
    let outlined = false;
    for (let node = one, up = 0; node && up < 4; node = node.parentElement, up++) outlined = outlined || ring(node);
    const edge = style.borderColor;
    one.blur(); const before = getComputedStyle(one).borderColor; one.focus();
    // Nodes come and go while the meters move, so places are compared and not counted.
    const last = window.lmLast, follows = !last || (last.compareDocumentPosition(one) & Node.DOCUMENT_POSITION_FOLLOWING);
    window.lmFirst = window.lmFirst || one; window.lmLast = one;
    return {
        html: one.outerHTML.slice(0, 200), tag: one.tagName, tabindex: one.tabIndex,
        around: last !== undefined && one === window.lmFirst && last !== null,
        follows: Boolean(follows), shown: box.width > 0 && box.height > 0, marked: outlined || edge !== before,
    };
}"""


def unfold(page: Any) -> None:
    """Open every visible accordion."""
    page.evaluate(
        "() => document.querySelectorAll('#tabs button.label-wrap:not(.open), #sidebar button.label-wrap:not(.open)')"
        ".forEach(one => one.offsetParent && one.click())"
    )
    page.wait_for_timeout(400)


def views(page: Any) -> Iterator[str]:
    """Every tab and every tab within, opened."""
    for number, (tab, (inner, _)) in enumerate(TABS.items()):
        page.locator("#tabs > .tab-wrapper button[role=tab]").nth(number).click()
        page.wait_for_timeout(500)
        names = page.locator(f"{inner} > .tab-wrapper button[role=tab]").all_inner_texts() if inner else [""]
        for name in dict.fromkeys(names):
            if name:
                page.locator(f"{inner} > .tab-wrapper button[role=tab]", has_text=name).first.click()
                page.wait_for_timeout(300)
            unfold(page)
            yield f"{tab} {name}".strip()


SETTLED = """() => Promise.all(document.getAnimations()
    .filter(one => one.effect.getTiming().iterations !== Infinity).map(one => one.finished.catch(() => null)))"""
"""Colours are judged once they have stopped changing."""


def violations(page: Any) -> list[str]:
    page.evaluate(SETTLED)
    found = axe_playwright.Axe().run(page, options=AXE).response["violations"]
    return [
        f"{rule['id']}: {node['target'][0]} {node['html'][:160]} {node['any'][0]['message'][:160] if node['any'] else ''}"
        for rule in found
        for node in rule["nodes"]
    ]


def load(visit: Visit) -> None:
    visit.page.click("#load")
    visit.page.wait_for_selector("#message textarea")
    visit.send("What is a KV cache?")
    visit.page.wait_for_selector("#message .stop-button")
    visit.page.click("#message .stop-button")
    visit.page.wait_for_selector("#message .submit-button")


@pytest.mark.parametrize(("scheme", "locale"), LOOKS)
def test_every_control_has_a_name_and_every_text_its_contrast(
    browser: Any,  # noqa: F811
    stub_url: str,  # noqa: F811
    scheme: str,
    locale: str,
) -> None:
    visit = Visit(browser, stub_url, "desktop", scheme, "access", locale)
    found = {"first": violations(visit.page)}
    load(visit)
    found |= {view: violations(visit.page) for view in views(visit.page)}
    visit.page.evaluate("() => document.body.append(document.createElement('textarea'))")
    assert len(violations(visit.page)) == 1  # what is wrong is seen
    visit.close()
    assert len(found) > 9
    assert {view: wrong for view, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(("scheme", "locale"), LOOKS)
def test_no_view_of_a_phone_scrolls_sideways(browser: Any, stub_url: str, scheme: str, locale: str) -> None:  # noqa: F811
    visit = Visit(browser, stub_url, "phone", scheme, "access-phone", locale)
    load(visit)
    wide = {}
    for view in views(visit.page):
        wide[view] = visit.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        visit.page.screenshot(
            path=f"tests/screenshots/access-phone-{scheme}-{view.replace(' ', '-')}.png", full_page=True
        )
    visit.close()
    assert {view: pixels for view, pixels in wide.items() if pixels > 0} == {}


@pytest.mark.parametrize(("size", "scheme", "locale"), [("desktop", "light", "en-US"), ("phone", "dark", "pt-BR")])
def test_planning_for_another_machine_is_accessible_at_any_width(
    browser: Any,  # noqa: F811
    stub_url: str,  # noqa: F811
    size: str,
    scheme: str,
    locale: str,
) -> None:
    visit = Visit(browser, stub_url, size, scheme, "access-another-machine", locale)
    page = visit.page
    page.click("#another-machine .label-wrap")
    page.wait_for_selector("#another-plan .lm-elsewhere")
    assert page.locator("#another-vram").is_visible()
    page.click("#what-runs")
    page.wait_for_selector("#what-runs-table table")
    page.locator("#another-gpu input").fill("NVIDIA T4")
    page.keyboard.press("Enter")
    page.wait_for_selector("#another-plan :text('NVIDIA T4')")
    page.wait_for_selector("#another-vram", state="hidden")
    assert violations(page) == []
    visit.shot("plan")
    visit.close()


def test_the_keyboard_reaches_everything_in_reading_order(browser: Any, stub_url: str) -> None:  # noqa: F811
    visit = Visit(browser, stub_url, "desktop", "light", "access-keys")
    page = visit.page
    load(visit)
    found: dict[str, dict[str, list[str]]] = {}
    for view in views(page):
        page.evaluate("() => { document.activeElement.blur(); window.lmFirst = window.lmLast = null; }")
        page.mouse.click(5, 5)
        steps: list[dict[str, Any]] = []
        for _ in range(150):
            page.keyboard.press("Tab")
            focus = page.evaluate(FOCUSED)
            if focus["tag"] == "BODY" or focus["around"]:
                break
            steps.append(focus)
        assert 15 < len(steps) < 150, view
        wrong = {
            "goes back": [step["html"] for step in steps if not step["follows"]],
            "jumps the order": [step["html"] for step in steps if step["tabindex"] > 0],
            "shows no focus": [step["html"] for step in steps if step["shown"] and not step["marked"]],
        }
        found |= {view: {what: which for what, which in wrong.items() if which}}
    visit.close()
    assert len(found) > 8
    assert {view: wrong for view, wrong in found.items() if wrong} == {}


def test_the_first_answer_needs_no_mouse(browser: Any, stub_url: str) -> None:  # noqa: F811
    visit = Visit(browser, stub_url, "desktop", "light", "access-no-mouse")
    page = visit.page
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "load":
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement?.closest('#message')")
    page.keyboard.type("What is a KV cache?")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#chat .bot')?.innerText.trim().length > 10")
    visit.close()


def test_without_a_hub_the_page_says_so_once_and_goes_on(browser: Any, stub_url: str) -> None:  # noqa: F811
    """The tests' own state: `HF_HUB_OFFLINE` is set."""
    visit = Visit(browser, stub_url, "desktop", "light", "access-no-hub")
    page = visit.page
    page.wait_for_selector("#hub-notice p")
    load(visit)
    for _ in views(page):
        pass
    assert (
        page.locator(
            f"text={'The hub cannot be reached. Models on this machine, the demo and .gguf files still work.'}"
        ).count()
        == 1
    )
    assert page.locator("[role=alert]:visible").count() == 0
    visit.close()
