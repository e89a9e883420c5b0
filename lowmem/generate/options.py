"""Options of text generation, declared once for forms, flags and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.fields import Option, describe, option
from lowmem.messages import msg

LARGEST_BATCH = 64
"""Prompts at once."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of one generation, named as in transformers where it has the same option.

    With `greedy` the sampling options have no effect, but for the repetition penalty. Sampling options that are None
    take what the model's generation_config.json says, see `sampling`.
    """

    max_new_tokens: int = option(
        256,
        msg("Max new tokens"),
        msg("Upper limit for the answer. Every token takes space in the KV cache."),
        low=1,
        high=1_000_000,
        step=1,
    )
    greedy: bool = option(False, msg("Greedy"), msg("Always take the most likely token: no sampling, repeatable."))
    temperature: float | None = option(
        0.7,
        msg("Temperature"),
        msg("Below 1 is more predictable, above 1 more random."),
        low=0.05,
        high=5.0,
        step=0.05,
        from_model=True,
    )
    top_k: int | None = option(
        50,
        msg("Top-k"),
        msg("Sample from the k most likely tokens; 0 turns it off."),
        low=0,
        high=1000,
        step=1,
        from_model=True,
    )
    top_p: float | None = option(
        0.95,
        msg("Top-p"),
        msg("Sample from the most likely tokens that together reach this probability; 1 turns it off."),
        low=0.01,
        high=1.0,
        step=0.01,
        from_model=True,
    )
    min_p: float | None = option(
        0.0,
        msg("Min-p"),
        msg("Drop tokens less likely than this fraction of the most likely one; 0 turns it off."),
        low=0.0,
        high=0.99,
        step=0.01,
        from_model=True,
    )
    repetition_penalty: float | None = option(
        1.0,
        msg("Repetition penalty"),
        msg("Above 1 discourages tokens already in the text; 1 turns it off."),
        low=0.5,
        high=3.0,
        step=0.05,
        from_model=True,
    )
    seed: int = option(
        -1,
        msg("Seed"),
        msg("The same seed gives the same answer; -1 picks a new seed."),
        low=-1,
        high=2**31 - 1,
        step=1,
    )
    stop: tuple[str, ...] = option(
        (), msg("Stop strings"), msg("End the answer before any of these strings; one per line.")
    )
    num_return_sequences: int = option(
        1,
        msg("Sequences"),
        msg("Independent answers to one prompt, which is processed only once."),
        low=1,
        high=16,
        step=1,
        aliases=("num_sequences",),
    )
    cache_type: str = option(
        "same",
        msg("KV cache type"),
        msg(
            "int8 takes half or a quarter of the memory at a small loss of precision, int4 and int2 take even less; ram keeps a GPU's cache in RAM."
        ),
        choices=("same", "int8", "int4", "int2", "ram"),
        aliases=("kv",),
    )
    window: int = option(
        0,
        msg("Window"),
        msg(
            "Cache only this many of the latest tokens, so that text of any length takes constant memory. 0 caches all tokens."
        ),
        low=0,
        high=1_000_000,
        step=64,
    )
    sinks: int = option(
        4,
        msg("Sinks"),
        msg(
            "First tokens that stay cached in addition to the window; without them quality collapses once they leave it."
        ),
        low=0,
        high=256,
        step=1,
    )
    unbounded: bool = option(
        False,
        msg("Unbounded"),
        msg("Ignore the end-of-text token and continue until the maximum number of new tokens."),
        aliases=("endless",),
    )
    use_cache: bool = option(
        True,
        msg("KV cache"),
        msg("When off, the whole text (or window) is recomputed for every token: slow, but takes no cache memory."),
    )
    prompt_lookup_num_tokens: int = option(
        0,
        msg("Prompt lookup"),
        msg(
            "Draft up to this many tokens from earlier text and verify them in one pass: faster for repetitive text, with identical output. Only for greedy decoding in fp32; 0 turns it off."
        ),
        low=0,
        high=32,
        step=1,
        aliases=("lookahead",),
    )
    prefill_chunk: int = option(
        512,
        msg("Prefill chunk"),
        msg("Prompt tokens per pass; fewer tokens take less memory."),
        low=16,
        high=8192,
        step=16,
    )

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """How to choose tokens: as these options say, else as `defaults` do, such as a generation_config.json, else as usual.

        Defaults that are no numbers are ignored, those beyond an option's range are moved into it.
        """
        chosen: dict[str, Any] = {}
        for one in describe(self):
            if one.from_model:
                value = getattr(self, one.name)
                chosen[one.name] = _within(one, defaults.get(one.name)) if value is None else value
        return Sampling(self.greedy, **chosen)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The options of `GenerateOptions` that choose a token, all of them decided."""

    greedy: bool = False
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def _within(option: Option, value: Any) -> Any:
    """`value` as a value of `option`, its default if it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return option.default
    low, high = option.low or 0, option.high or math.inf
    return type(option.default)(min(max(value, low), high))
