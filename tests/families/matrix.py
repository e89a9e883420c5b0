"""The matrix of families and actions as a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Cells = Mapping[str, Mapping[str, str]]
"""Type -> action -> outcome, see `check.outcome`."""

CANNOT = "transformers cannot: "
"""How an outcome begins where there is nothing to compare with."""

ACTIONS = {
    "plan": "predicted bytes of weights and cache are those held",
    "greedy": "tokens are those of transformers' `generate`",
    "batch": "three prompts of different lengths at once are answered as alone",
    "int8": "loaded in int8: predicted bytes are those held, logits near the original's",
    "rtn": "quantized to 8 bits by rounding, saved, read back",
    "gptq": "the same with GPTQ in 4 bits",
    "awq": "the same with AWQ in 4 bits",
    "offload": "blocks read from disk for every token: texts of the resident model",
    "window": "a wide window changes nothing, a narrow one does not depend on how the prompt is cut",
    "packed": "the cache in int8: predicted bytes are those held, texts begin alike",
    "export": "an ONNX graph in fp32 gives transformers' tokens",
}

_HEAD = """# Families

What lowmem does with every type of causal language model that transformers can build. Each row is a toy of the type
(four layers, random weights, every kind of layer that the family has), saved as the hub's checkpoints are. `python -m
tests.families` makes this table; `tests/families` has the toys and the checks.

"""


def _kind(cell: str) -> str:
    return "transformers cannot" if cell.startswith(CANNOT) else cell.partition(":")[0]


def counted(cells: Cells) -> Counter[str]:
    """How many cells there are of each kind: "ok", "refused", "WRONG", "CRASH", "transformers cannot"."""
    return Counter(_kind(cell) for row in cells.values() for cell in row.values())


def summary(cells: Cells) -> str:
    counts = counted(cells)
    compared = sum(counts.values()) - counts["transformers cannot"]
    others = ", ".join(f"{counts[kind]} {kind}" for kind in ("refused", "WRONG", "CRASH") if counts[kind])
    share = counts["ok"] / max(compared, 1)
    return f"{len(cells)} types: {counts['ok']} of {compared} cells run ({share:.1%})" + (
        f"; {others}" if others else ""
    )


def document(cells: Cells, excluded: Mapping[str, str]) -> str:
    """The whole file: summary, meaning of the columns, table, footnotes by reason, excluded types."""
    reasons = sorted({cell for row in cells.values() for cell in row.values() if cell != "ok"})
    number = {reason: index for index, reason in enumerate(reasons, 1)}
    lines = [f"| type | {' | '.join(ACTIONS)} |", f"| --- |{' --- |' * len(ACTIONS)}"]
    for kind in sorted(cells):
        row = [cells[kind].get(action, "") for action in ACTIONS]
        shown = [cell if cell in ("ok", "") else f"{_kind(cell)} {number[cell]}" for cell in row]
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    columns = [f"- **{action}**: {meaning}" for action, meaning in ACTIONS.items()]
    notes = [f"{index}. {_escaped(reason)}" for reason, index in number.items()]
    left_out = [f"- {kind}: {reason}" for kind, reason in sorted(excluded.items())]
    parts = [
        _HEAD + f"**{summary(cells)}.**",
        "\n".join(columns),
        "\n".join(lines),
        *(["## What the numbers say", "\n".join(notes)] if notes else []),
        "## Types that are left out",
        "\n".join(left_out),
    ]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
