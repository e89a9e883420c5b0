"""Put the figures of `results/` into the README, between its two markers.

python -m benchmarks.readme
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import memory, offload, quantize
from benchmarks.common import ROOT, saved, table

BEGIN, END = "<!-- results -->", "<!-- /results -->"
TABLES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "memory": memory.shown,
    "speed": dict,
    "app": dict,
    "first_token": dict,
    "offload": offload.shown,
    "quantize": quantize.shown,
    "quantize_7b": dict,
    "crossload": dict,
    "export": dict,
    "longctx_stream": dict,
    "longctx_speed": dict,
    "longctx_kv": dict,
    "longctx_quality": dict,
    "longctx_hidden": dict,
}
"""Results files in the README's order, each with how a row is shown; those that are missing are left out."""


TITLES = {
    "memory": "Peak memory, predicted and measured",
    "speed": "Speed, beside transformers",
    "app": "The page",
    "offload": "Offloading",
    "quantize": "Quantization of the demo model",
    "quantize_7b": "Quantization of a model of 7B",
    "crossload": "Checkpoints in gptqmodel",
    "export": "Exported graphs, beside PyTorch, llama.cpp and onnxruntime-genai",
}


def main() -> None:
    readme = ROOT.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    parts = [
        _part(TITLES.get(name, name), show, content)
        for name, show in TABLES.items()
        if (content := saved(name))["rows"]
    ]
    readme.write_text(head + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + tail, encoding="utf-8")


def _part(title: str, show: Callable[[dict[str, Any]], dict[str, Any]], content: dict[str, Any]) -> str:
    return "\n\n".join([f"### {title}", table([show(row) for row in content["rows"]]), *content["notes"]])


if __name__ == "__main__":
    main()
