"""The keyword by which a model's `forward` takes its KV cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The parameter of `forward` for the cache, "" if it takes none.

    It is `cache`; older releases of transformers call it `past_key_values`, and Mamba `cache_params`. Releases with
    `cache` still take the older names, but with a FutureWarning.
    """
    declared = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in declared), "")
