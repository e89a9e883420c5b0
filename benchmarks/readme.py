"""Put the figures of `results/` into the README, between its two markers.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS, ROOT, table
from benchmarks.memory import shown

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def main() -> None:
    readme = ROOT.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    tables = [table([shown(row) for row in rows("memory")]), table(rows("speed")), table(rows("app"))]
    readme.write_text(head + BEGIN + "\n" + "\n\n".join(tables) + "\n" + END + tail, encoding="utf-8")


def rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


if __name__ == "__main__":
    main()
