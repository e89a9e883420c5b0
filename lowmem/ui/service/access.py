"""Permissions on a page: the owner may do everything, visitors nothing that costs the owner accounts or memory.

The owner is known by the name of the sign-in; visitors share one, so each is known by address and page. Both are in
gradio's context of the running event, which `worker.pump` carries into the engine's thread; without a context nobody is
the owner.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gradio.context import LocalContext

from lowmem.errors import NotAllowed
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.options import ReadingLimit
from lowmem.messages import msg
from lowmem.models.reference import Reference, parse_ref
from lowmem.settings import settings
from lowmem.ui.service.rate_limits import address_of

MOST_TOKENS = 4096
UNBOUNDED = 1_000_000
"""New tokens of an unbounded generation: more than anybody waits for."""

MOST_PROMPTS = 100

READING = ReadingLimit(tokens=2**18, file_bytes=10**9)
"""For hidden states, perplexity and recall."""


class Visitor(NamedTuple):
    """Who sends a request.

    Args:
        address: of the browser or program; "" for the page's owner.
        page: the open page, or the client of `gradio_client`: a random number that only its maker knows.
    """

    address: str = ""
    page: str = ""


OWNER = Visitor()

VISITOR_HEADER, SHORTEST_SECRET = "x-lowmem-visitor", 16
"""The header by which a program that uses MCP is known again, and the least characters of its value."""

VISITORS = "visitors"
"""The folder below `settings().outputs` with a folder of results for each visitor."""


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of one page.

    Args:
        public: others than the owner of this machine can open the page.
        owner: on a public page, the sign-in that owns it; "" for none.
        any_model: visitors may name any model of the hub, and not only those that the page lists.
    """

    public: bool = False
    owner: str = ""
    any_model: bool = True
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)

    @property
    def visitor(self) -> Visitor:
        """Who sends the current request: `OWNER`, or a visitor.

        MCP has no sessions and all of its tools share one client here, so a program that wants to be known again sends
        a secret of its own as `VISITOR_HEADER`; without it each of its requests is a visitor of its own.
        """
        if self.owned:
            return OWNER
        request = LocalContext.request.get(None)
        if request is None or request.request is None:
            return Visitor("-", secrets.token_hex(16))
        address = address_of(request.request.scope) or "-"
        if request.headers.get("x-gradio-user") == "mcp":
            secret = request.headers.get(VISITOR_HEADER) or ""
            page = secret if len(secret) >= SHORTEST_SECRET else ""
        else:
            page = str(request.session_hash or "")
        return Visitor(address, page or secrets.token_hex(16))

    @property
    def results(self) -> Path:
        """Where results of the current request go: of visitors, into a folder whose name only its maker learns."""
        visitor = self.visitor
        if visitor == OWNER:
            return settings().outputs
        name = hashlib.blake2b("\n".join(visitor).encode(), digest_size=16, key=self._secret).hexdigest()
        return settings().outputs / VISITORS / name

    def is_private(self, path: Path | None) -> bool:
        """Whether `path` is a result of somebody else."""
        if path is None or self.owned:
            return False
        path = path.resolve()
        return path.is_relative_to(settings().outputs.resolve()) and not path.is_relative_to(self.results.resolve())

    def may_use(self, path: Path) -> bool:
        """Whether the current request may name `path`: no result of the owner. Who can name one of a visitor has made it."""
        if not self.is_private(path):
            return True
        parts = path.resolve().relative_to(settings().outputs.resolve()).parts
        return len(parts) > 1 and parts[0] == VISITORS

    @property
    def owned(self) -> bool:
        """Whether the current request comes from the page's owner."""
        if not self.public:
            return True
        request = LocalContext.request.get(None)
        return bool(self.owner) and request is not None and request.username == self.owner

    def require_owner(self, what: str) -> None:
        """Let only the owner do `what` ("Pushing to the hub").

        Raises:
            NotAllowed: the request is a visitor's.
        """
        if not self.owned:
            raise NotAllowed(
                msg("{what} is reserved for the owner of this page.", what=what),
                msg("Run lowmem on your own machine to do this."),
            )

    def check_model(self, ref: str) -> None:
        """Let visitors use the models that the page lists and their own results; of the hub others if the page allows it.

        Raises:
            NotAllowed: another one.
            BadInput: no reference.
        """
        if not (self.owned or self._is_for_visitors(parse_ref(ref, allow_paths=False))):
            raise NotAllowed(
                msg("This page runs only the models it lists; {ref!r} is not one of them.", ref=ref[:80]),
                msg("Choose one from the list."),
            )

    def _is_for_visitors(self, reference: Reference) -> bool:
        from lowmem.models.catalog import find
        from lowmem.models.source import local_models

        if reference.path.is_relative_to(settings().outputs.resolve()):
            return self.may_use(reference.path)
        if self.any_model or find(reference.text) is not None:
            return True
        return reference.text in [model.ref for model in local_models(self.results)]

    @property
    def longest(self) -> int:
        """Maximum new tokens of an unbounded generation for the current request."""
        return UNBOUNDED if self.owned else MOST_TOKENS

    def check_work(self, options: GenerateOptions, prompts: int = 1) -> None:
        """Refuse a visitor's work that would block others for hours.

        Raises:
            NotAllowed: too many prompts or new tokens.
        """
        if self.owned:
            return
        if prompts > MOST_PROMPTS:
            raise NotAllowed(
                msg(
                    "{prompts:,} prompts are more than the {most_prompts} that visitors may send.",
                    prompts=prompts,
                    most_prompts=MOST_PROMPTS,
                ),
                msg("Send fewer."),
            )
        if options.max_new_tokens > MOST_TOKENS:
            raise NotAllowed(
                msg(
                    "{max_new_tokens:,} new tokens are more than the {most_tokens:,} that visitors may request.",
                    max_new_tokens=options.max_new_tokens,
                    most_tokens=MOST_TOKENS,
                ),
                msg("Request fewer."),
            )

    @property
    def reading_limit(self) -> ReadingLimit | None:
        """Of actions of the current request that read a text once."""
        return None if self.owned else READING

    def check_reading(self, tokens: int) -> None:
        """Refuse a visitor's measurements on a long text, which read it several times.

        Raises:
            NotAllowed: too many tokens.
        """
        if tokens > MOST_TOKENS and not self.owned:
            raise NotAllowed(
                msg(
                    "{tokens:,} tokens of text are more than the {most_tokens:,} allowed for visitors.",
                    tokens=tokens,
                    most_tokens=MOST_TOKENS,
                ),
                msg("Use fewer tokens."),
            )
