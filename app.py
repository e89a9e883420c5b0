"""lowmem's web app: python app.py, then open the address that it prints."""

from __future__ import annotations

import argparse
import os
import sys

# CUDA, gradio and the hub client read these while they are imported.
for name, value in {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which NVML counts, too
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  it stands in for CUDA, so it comes before whatever could start that

from lowmem.errors import LowMemError  # noqa: E402
from lowmem.ui.launch import serve  # noqa: E402
from lowmem.ui.page import build_ui  # noqa: E402
from lowmem.ui.translate import languages  # noqa: E402

demo = build_ui()


def main() -> int:
    """Read the flags, serve until interrupted; 3 for a failure with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help="port to listen on (7860, or the next free one)")
    parser.add_argument("--host", help="address to listen on (this machine only)")
    parser.add_argument("--share", action="store_true", help="also through a public link, behind a password")
    parser.add_argument("--auth", metavar="USER:PASS", help="ask for this sign-in")
    parser.add_argument("--budget", metavar="SIZE", help="memory to use on the computing device, such as 4G")
    parser.add_argument("--model", metavar="REF", help="model to propose: a hub id, a folder, a .gguf file")
    parser.add_argument("--lang", choices=languages(), help="language of the page (what each browser asks for)")
    parser.add_argument("--listed-only", action="store_true", help="visitors run the listed models and no others")
    parser.add_argument("--mcp", action="store_true", help="offer everything as MCP tools, too")
    flags = parser.parse_args()
    try:
        serve(**vars(flags), demo=demo)
    except LowMemError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
