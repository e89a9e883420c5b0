"""Every sentence of the source that a visitor may read, as templates with `{}` for what is filled in."""

from __future__ import annotations

import ast
import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import lowmem
import lowmem.errors
from lowmem.ui.i18n.translate import SPOKEN, TAG

PACKAGE = Path(lowmem.__file__).parent
ERRORS = {name for name, kind in vars(lowmem.errors).items() if isinstance(kind, type)}
SHOWN_ARGUMENTS = {**dict.fromkeys(ERRORS, (0, 1)), "option": (1, 2), "Step": (2,), "Line": (2,)}
"""Calls whose arguments at these places are shown, a single word too."""

COMMANDS = ("__main__.py", "launch.py", "arguments.py", "publish.py", "card.py")
"""The command line, the endpoints' documentation and model cards speak English; failures may come up in the page, too."""

QUIET_CALLS = {
    "ArgumentParser", "add_argument", "add_parser", "add_mutually_exclusive_group", "compile", "getLogger", "print",
    "ValueError", "TypeError", "KeyError", "RuntimeError", "AttributeError", "ImportError", "AssertionError", "OSError",
    "ArgumentTypeError", "LocalFont", "Choices", "sub", "search", "match", "fullmatch", "split", "run",
}  # fmt: skip
QUIET_FUNCTIONS = re.compile(r"snippet|readme|card_of|_code|^serving$")
QUIET_KEYWORDS = {
    "elem_id",
    "elem_classes",
    "js",
    "html_template",
    "key",
    "encoding",
    "api_name",
    "snippet",
    "loc",
    "textcoords",
    "xycoords",
}
NOT_SHOWN = {"long_about", "long_read_it", "offload_prompt", "title"}
"""Of the table of strings: what models read, and the name of the product."""

IGNORED = re.compile(
    r"\n|%s|%d|^[\w.]*\.$|^Bearer |^NVIDIA |font|past_key_values|lm-|^torch |out of memory|allocate memory"
    r"|^(ram|disk|bus) \{\}|^model name|not implemented|registered function|kB$|^\(\) =>|^import |Segoe|Plex|^https?:"
)
CODE = re.compile(
    r"^pip install|^vllm serve|rotary\{\}|^\\\(|=\"|@media|-\{\}bit|^\{\{:|^PyTorch fp32$|^ONNX Runtime$|tokens  perplexity"
    r"|^\{\} weights$|threads$|^(?:vram|blocks) \{\}$|^BlockPlacement\(|^[\d.]+ [KMG]B$|^Quantização |^GPTQ: Q|^Inferência |^Otimização |^GPT-2 Small|^BERT |^\{\} · \{\} · \{\} tokens$|^bitsandbytes, "
)
"""Patterns, file names, styles and names of products, in any language the same."""

WORDS = (
    "load", "unload", "generate", "batch", "quantize", "compare", "export", "exercise", "offload",
    "blocks", "runs", "time", "decode", "prefill", "perplexity", "tokens", "shape", "dtype", "windows", "tokens/s",
    "Prompt", "Answer", "Speed", "Memory", "Prefill", "Parameters", "none",
)  # fmt: skip
"""Single words, which cannot be told from keys: shown all the same."""


def sentences() -> dict[str, list[str]]:
    """Template to the places in the source where it stands."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        templates = (
            _of_table(tree)
            if name == "ui/i18n/strings.py"
            else _of_module(tree, path.name in COMMANDS or name.startswith("cli/"))
        )
        for template, line in templates:
            found.setdefault(template, []).append(f"{name}:{line}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in WORDS:
                found.setdefault(node.value, []).append(f"{name}:{node.lineno}")
    return found


def _of_table(tree: ast.Module) -> Iterator[tuple[str, int]]:
    table = next(node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    assert isinstance(table, ast.Dict)
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant)
        if key.value in NOT_SHOWN:
            continue
        for node in _values(value):
            for part in str(node.value).split("|"):  # rows of a table's header
                yield from _lettered(re.sub(r"\{[^}]*\}", "{}", part), node.lineno)


def _values(node: ast.AST) -> Iterator[ast.Constant]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    children = node.values if isinstance(node, ast.Dict) else ast.iter_child_nodes(node)
    for child in children:
        yield from _values(child)


def _of_module(tree: ast.Module, errors_only: bool) -> Iterator[tuple[str, int]]:
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    shown = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for place in SHOWN_ARGUMENTS.get(_called(node), ())
        for part in [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg in ("message", "hint"))]
    }
    for node, certain in _strings(tree, shown, False):
        if id(node) in docs or (errors_only and not certain):
            continue
        for template in templates(node):
            if "</" in template or re.search(r"<\w+[ >]", template):
                yield from _of_html(template, node.lineno)
            elif certain or _is_sentence(template):
                yield from _lettered(template, node.lineno)


def _strings(node: ast.AST, shown: set[int], certain: bool) -> Iterator[tuple[ast.expr, bool]]:
    """Outermost string expressions, and whether they are shown for certain."""
    for child in ast.iter_child_nodes(node):
        sure = id(child) in shown or (certain and isinstance(child, (ast.IfExp, ast.BoolOp)))
        if is_string(child):
            yield child, sure
        elif not _quiet(child):
            yield from _strings(child, shown, sure)
            continue
        for inner in ast.walk(child) if isinstance(child, ast.JoinedStr) else ():
            if isinstance(inner, ast.FormattedValue) and not isinstance(inner.value, (ast.IfExp, ast.JoinedStr)):
                yield from _strings(inner.value, shown, False)


def _quiet(node: ast.AST) -> bool:
    """Does nothing in here reach a visitor?"""
    match node:
        case ast.Call():
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            return _called(node) in QUIET_CALLS or (isinstance(owner, ast.Name) and owner.id == "log")
        case ast.keyword(arg=str(arg)):
            return arg in QUIET_KEYWORDS
        case ast.FunctionDef(name=name):
            return bool(QUIET_FUNCTIONS.search(name))
    return isinstance(node, (ast.Assert, ast.Compare))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def is_string(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Constant(value=str()):
            return True
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return is_string(left) or is_string(right)
    return False


def templates(node: ast.AST) -> list[str]:
    """A string expression as templates: several where a condition chooses between texts."""
    match node:
        case ast.Constant(value=str(text)):
            return [text.replace("{", "{{").replace("}", "}}")]
        case ast.JoinedStr(values=parts):
            return ["".join(choice) for choice in itertools.product(*map(templates, parts))]
        case ast.FormattedValue(value=ast.JoinedStr() as inner):
            return templates(inner)
        case ast.FormattedValue(value=ast.IfExp(body=body, orelse=orelse)):
            return [*templates(body), *templates(orelse)]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return ["".join(choice) for choice in itertools.product(templates(left), templates(right))]
    return ["{}"]


def _of_html(template: str, line: int) -> Iterator[tuple[str, int]]:
    for piece in TAG.split(template):
        if piece.startswith("<"):
            for _, spoken in SPOKEN.findall(piece):
                yield from _lettered(html.unescape(spoken), line)
        else:
            yield from _lettered(html.unescape(piece), line)


def _is_sentence(template: str) -> bool:
    bare = template.replace("{}", " ").strip()
    return bool(
        re.search(r"[A-Za-z]{2,}[,:;]? +\S", bare)
        or re.search(r"\S +[A-Za-z]{2,}", bare)
        or re.search(r"\{\} of \{\}", template)
        or ("{}" in template and re.search(r"[A-Za-z]{4,}", bare) and " " in template.strip())
    ) and not IGNORED.search(template)


def _lettered(template: str, line: int) -> Iterator[tuple[str, int]]:
    template = template.strip()
    if re.search(r"[A-Za-z]{2,}", template.replace("{}", " ")) and not CODE.search(template):
        yield template, line
