"""The keyword by which a model's `forward` takes its KV cache."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from transformers import Cache


def cache_argument(model: Any) -> str:
    """The parameter of `forward` for the cache, "" if it takes none, or one of the family's own (xLSTM).

    It is `cache`; older releases of transformers call it `past_key_values`, and Mamba `cache_params`. Releases with
    `cache` still take the older names, but with a FutureWarning.
    """
    declared = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values", "cache_params") if name in declared), "")
    kinds = [kind for kind in get_args(declared[name].annotation) if isinstance(kind, type)] if name else []
    own = any(kind.__module__ == type(model).__module__ and not issubclass(kind, Cache) for kind in kinds)
    return "" if own else name
