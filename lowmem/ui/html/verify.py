"""The claims of a verification as HTML. Pure functions of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem.events import Receipt
from lowmem.messages import msg
from lowmem.ui.html import parts
from lowmem.ui.language import escape
from lowmem.ui.names import name
from lowmem.verify.claims import FAILED, PASSED, Claim

_COLORS = {PASSED: "fits", FAILED: "over"}


def verified(claims: Sequence[Claim], receipt: Receipt | None) -> str:
    """Every claim with its verdict, and the report to download once there is one."""
    rows = "".join(map(_row, claims))
    ended = ""
    if receipt is not None:
        failed = sum(claim.verdict == FAILED for claim in claims)
        sentence = (
            msg("{failed} of the claims do not hold.", failed=failed)
            if failed
            else msg("Every claim that was measured holds.")
        )
        ended = f'<p class="lm-sentence" role="status">{escape(sentence)}</p>'
        ended += parts.link(Path(receipt.details["file"]), msg("Download the report (JSON)"))
    return f'<section class="lm-verified"><ul class="lm-notes">{rows}</ul>{ended}</section>' if rows else ""


def _row(claim: Claim) -> str:
    pill = (
        f'<span class="lm-pill" data-verdict="{_COLORS.get(claim.verdict, "")}">'
        f"{escape(name('claim_verdicts', claim.verdict))}</span>"
    )
    return f"<li><strong>{escape(name('claims', claim.key))}</strong> {pill} {escape(claim.sentence)}</li>"
