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
from lowmem.ui.flags import add_flags  # noqa: E402
from lowmem.ui.launch import serve  # noqa: E402
from lowmem.ui.page import build_ui  # noqa: E402

demo = build_ui()


def main() -> int:
    """Read the flags, serve until interrupted; 3 for a failure with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser)
    flags = parser.parse_args()
    try:
        serve(**vars(flags), demo=demo)
    except LowMemError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
