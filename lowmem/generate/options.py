"""What can be set for a generation; the one declaration behind form, flags and checks."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.fields import option


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of one generation. `greedy` makes the sampling options irrelevant."""

    max_new_tokens: int = option(
        256, "Max new tokens", "Longest answer. Each token costs KV cache.", low=1, high=1_000_000, step=1
    )
    greedy: bool = option(False, "Greedy", "Always take the most likely token: repeatable, no sampling.")
    temperature: float = option(
        0.7, "Temperature", "Below 1 safer, above 1 more surprising.", low=0.05, high=5.0, step=0.05
    )
    top_k: int = option(50, "Top-k", "Sample among the k most likely tokens; 0 is off.", low=0, high=1000, step=1)
    top_p: float = option(
        0.95,
        "Top-p",
        "Sample among the most likely tokens that together reach this probability; 1 is off.",
        low=0.01,
        high=1.0,
        step=0.01,
    )
    min_p: float = option(
        0.0,
        "Min-p",
        "Drop tokens less likely than this fraction of the best one; 0 is off.",
        low=0.0,
        high=0.99,
        step=0.01,
    )
    repetition_penalty: float = option(
        1.0,
        "Repetition penalty",
        "Above 1 discourages tokens already in the text; 1 is off.",
        low=0.5,
        high=3.0,
        step=0.05,
    )
    seed: int = option(
        -1, "Seed", "The same seed repeats the same answer; -1 draws a new one.", low=-1, high=2**31 - 1, step=1
    )
    stop: tuple[str, ...] = option((), "Stop strings", "End the answer before any of these; one per line.")
    num_sequences: int = option(
        1, "Answers", "Different answers to one prompt; the prompt is processed once.", low=1, high=16, step=1
    )
    kv: str = option(
        "same",
        "KV cache storage",
        "int8 stores the cache in a half or a quarter of the memory, a little less exactly; int4 and int2 in less still; "
        "ram keeps that of a GPU in RAM.",
        choices=("same", "int8", "int4", "int2", "ram"),
    )
    window: int = option(
        0,
        "Window",
        "Remember only so many of the latest tokens: text without end in memory that stays the same. 0 remembers all.",
        low=0,
        high=1_000_000,
        step=64,
    )
    sinks: int = option(
        4,
        "Sinks",
        "First tokens that are kept beside a window: without them the model falls apart when they leave it.",
        low=0,
        high=256,
        step=1,
    )
    endless: bool = option(
        False, "Endless", "Go on after the model has ended its text, until all new tokens are there."
    )
    use_cache: bool = option(
        True, "KV cache", "Off recomputes the whole text, or the window, for every token: slow, no cache memory."
    )
    lookahead: int = option(
        0,
        "Lookahead",
        "Guess up to so many tokens from what the text has said before, and check them in one pass: faster where text repeats "
        "itself, and the same text. Only for greedy answers in fp32; 0 is off.",
        low=0,
        high=32,
        step=1,
    )
    prefill_chunk: int = option(
        512, "Prefill chunk", "Prompt tokens per pass: smaller needs less memory.", low=16, high=8192, step=16
    )
