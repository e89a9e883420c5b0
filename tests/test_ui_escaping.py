"""Nothing from outside becomes HTML: errors, models' text, names of files and models."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from ui_stub import StubEngine

import lowmem.ui
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.longctx.strategies import Point
from lowmem.measure.rows import Row
from lowmem.ui.html import longctx, offload, parts, plan, quantize, verify
from lowmem.ui.language import escape
from lowmem.ui.parts.failures import notice
from lowmem.ui.service.engine import Choice
from lowmem.verify.claims import Claim

HOSTILE = '<img src=x onerror="alert(1)">'

FOREIGN = {
    *("error", "message", "hint", "text", "reason", "note", "prompt", "name", "model", "variant", "label", "choice"),
    *("ref", "detail", "strategy", "licence", "precision", "sentence"),
}
"""Attributes that hold what others wrote."""


def is_html(node: ast.JoinedStr) -> bool:
    return any(isinstance(part, ast.Constant) and "<" in str(part.value) for part in node.values)


def caught(tree: ast.AST) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}


def unescaped(source: str) -> Iterator[int]:
    """Lines whose HTML holds an error, or an attribute of `FOREIGN`, as it is."""
    tree = ast.parse(source)
    errors = caught(tree)
    for node in filter(lambda node: isinstance(node, ast.JoinedStr) and is_html(node), ast.walk(tree)):
        for part in node.values:  # type: ignore[attr-defined]
            match part:
                case ast.FormattedValue(value=ast.Name(id=name)) if name in errors:
                    yield part.lineno
                case ast.FormattedValue(value=ast.Attribute(attr=attribute)) if attribute in FOREIGN:
                    yield part.lineno
                case ast.FormattedValue(value=ast.Call(func=ast.Name(id="str" | "repr"))):
                    yield part.lineno
                case ast.FormattedValue(value=ast.Call(func=ast.Attribute(attr="sentence"))):
                    yield part.lineno
                case ast.FormattedValue(value=ast.Subscript(slice=ast.Constant(value=str(key)))) if key in FOREIGN:
                    yield part.lineno


@pytest.mark.parametrize("path", sorted(Path(lowmem.ui.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_html_holds_foreign_text_only_escaped(path: Path) -> None:
    assert list(unescaped(path.read_text(encoding="utf-8"))) == []


def test_the_check_finds_what_it_looks_for() -> None:
    source = """
try:
    pass
except Exception as error:
    a = f"<p>{error}</p>"
b = f"<p>{row.error}</p>"
c = f"<p>{str(x)}</p>"
d = f"<p>{plan.sentence()}</p>"
e = f"<p>{row['error']}</p>"
fine = f"<p>{escape(error)} {row.count}</p>", f"{error}"
"""
    assert sorted(unescaped(source)) == [5, 6, 7, 8, 9]


def hostile(value: object) -> object:
    """A dataclass with `HOSTILE` in each of its texts."""
    assert is_dataclass(value)
    texts = [one.name for one in fields(value) if isinstance(getattr(value, one.name), str)]
    return replace(value, **dict.fromkeys(texts, HOSTILE))  # type: ignore[type-var]


RECEIPT = hostile(
    Receipt("x", "x", "x", "x", 1.0, {"ram": 5}, {"ram": 6}, notes=(HOSTILE,), snippet="x", details={"recalls": []})
)


@pytest.mark.parametrize(
    "html",
    [
        lambda: notice(BadInput(HOSTILE, HOSTILE), toast=False),
        lambda: (
            parts.quiet(HOSTILE) + parts.small(HOSTILE) + parts.notes([HOSTILE]) + parts.pairs([(HOSTILE, HOSTILE)])
        ),
        lambda: parts.table((HOSTILE, HOSTILE, HOSTILE), [(HOSTILE, HOSTILE), (HOSTILE, HOSTILE, HOSTILE)]),
        lambda: plan.receipt(RECEIPT),
        lambda: plan.lost(HOSTILE, HOSTILE) + plan.unknown_card(HOSTILE) + plan.refusals([(HOSTILE, HOSTILE)], HOSTILE),
        lambda: plan.progress(Step(1, 2, HOSTILE, HOSTILE)),
        lambda: plan.resident(None, HOSTILE) + plan.machine(HOSTILE),
        lambda: plan.table([hostile(Completion(0, "x", "x"))]),
        lambda: plan.status([hostile(Chunk("x"))], ""),
        lambda: longctx.points([hostile(Point("x", error="x"))]),
        lambda: quantize.comparison([hostile(Row("x", error="x")), replace(hostile(Row("x")), error="")]),
        lambda: offload.comparison([{"method": HOSTILE, "error": HOSTILE}]),
        lambda: verify.verified([hostile(Claim("x", "x", "x"))], None),
    ],
)
def test_renderers_escape_every_text(html) -> None:
    assert HOSTILE not in html()
    assert "<img" not in html()


def test_a_plan_of_a_hostile_model_is_escaped() -> None:
    engine = StubEngine()
    made = engine.plan(Choice(model="demo"))
    source = replace(made.spec.source, name=HOSTILE, detail=HOSTILE, licence=HOSTILE)
    bad = replace(made, spec=replace(made.spec, source=source), reason=HOSTILE)
    card = plan.setup_card(bad, recommended=False, download=1, disk_free=1)
    assert "<img" not in card + plan.slim(bad, None) + plan.resident(bad, HOSTILE) + plan.budget(bad, HOSTILE)
    assert escape(HOSTILE) in card


def test_an_impossible_window_is_shown_as_text() -> None:
    """The card of the Long Context tab shows the error of its controls."""
    from lowmem.ui.tabs.longctx import LongContextTab

    engine = StubEngine()
    list(engine.load(engine.plan(Choice(model="demo")), CancelToken()))
    tab = object.__new__(LongContextTab)
    tab.engine = engine
    tab.read = lambda *_: (_ for _ in ()).throw(BadInput(HOSTILE, HOSTILE))  # type: ignore[method-assign]
    card = tab._card("text", None)
    assert "<img" not in card
    assert escape(HOSTILE) in card
