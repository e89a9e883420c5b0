"""Calibration data: which text, how many samples of how many tokens.

Texts come from `datasets.texts`; here they become token ids. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.datasets import texts
from lowmem.datasets.texts import CHARACTERS_PER_TOKEN
from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.messages import msg

NOTEWORTHY_OVERLAP = 0.01
"""Share of the evaluation text from which the overlap is reported."""

Samples = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text cut into samples of equal length."""

    text: str = option(
        texts.MANUAL,
        msg("Calibration text"),
        msg(
            "{manual} (included), {wikitext} or {c4} (from the hub), or the path of a text file.",
            manual=texts.MANUAL,
            wikitext=texts.WIKITEXT,
            c4=texts.C4,
        ),
    )
    samples: int = option(
        64, msg("Samples"), msg("More samples cover more of the language and take longer."), low=1, high=4096, step=1
    )
    length: int = option(
        512,
        msg("Tokens per sample"),
        msg("Longer samples calibrate attention over longer distances."),
        low=16,
        high=8192,
        step=16,
    )

    @property
    def tokens(self) -> int:
        return self.samples * self.length


def token_samples(tokenizer: Any, calibration: Calibration, context: int, cancel: CancelToken | None = None) -> Samples:
    """`samples` sequences of `length` token ids, spread evenly over the text; each begins as the tokenizer begins texts.

    Raises:
        BadInput: the text is too short, or a sample is longer than the model's `context`.
        Offline: the text is on the hub, which cannot be reached.
    """
    if calibration.length > context:
        raise BadInput(
            msg(
                "Samples of {length:,} tokens do not fit the model's context of {context:,}.",
                length=calibration.length,
                context=context,
            ),
            msg("Use {context:,} or fewer.", context=context),
        )
    text = texts.calibration_text(_source(calibration.text), cancel)
    start = _start(tokenizer)
    fresh = calibration.length - len(start)
    needed = calibration.samples * fresh
    ids = tokenizer(text.text[: CHARACTERS_PER_TOKEN * needed], add_special_tokens=False)["input_ids"]
    if len(ids) < needed:
        raise BadInput(
            msg(
                "The calibration text {text} has {ids:,} tokens; {samples} samples of {length} need {needed:,}.",
                text=text.name,
                ids=len(ids),
                samples=calibration.samples,
                length=calibration.length,
                needed=needed,
            ),
            msg("Use a longer text, or {ids} samples.", ids=len(ids) // fresh)
            if len(ids) >= fresh
            else msg("Use a longer text."),
        )
    stride = len(ids) // calibration.samples
    return tuple((*start, *ids[i * stride : i * stride + fresh]) for i in range(calibration.samples))


def _source(text: str) -> str | Path:
    return text if text in texts.NAMES else Path(text).expanduser()


def _start(tokenizer: Any) -> tuple[int, ...]:
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()


def overlap_warning(calibration: str, evaluation: str) -> str:
    """A warning if the calibration text contains part of the evaluation text, else ""."""
    share = texts.overlap(evaluation, calibration)
    if share < NOTEWORTHY_OVERLAP:
        return ""
    return msg(
        "{share:.0%} of the evaluation text is also in the calibration text: the results are too optimistic.",
        share=share,
    )
