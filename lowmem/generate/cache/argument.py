"""The keyword by which a model's `forward` takes its KV cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """Returns `cache` if `forward` declares it; older releases of transformers call it `past_key_values`.

    Releases with `cache` still take the older name, but with a FutureWarning.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
