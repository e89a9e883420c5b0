"""Permissions on a page: the owner may do everything, visitors nothing that costs the owner accounts or memory.

People are identified by the name they signed in with, from gradio's context of the running event,
which `worker.pump` carries into the engine's thread; without a context nobody is the owner.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradio.context import LocalContext

from lowmem.errors import NotAllowed
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg

MOST_TOKENS = 4096
UNBOUNDED = 1_000_000
"""New tokens of an unbounded generation: more than anybody waits for."""

MOST_PROMPTS = 100


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
        """Let visitors use the models that the page lists, and others only if the page allows it.

        Raises:
            NotAllowed: a model that is not listed.
        """
        if not (self.any_model or _is_listed(ref) or self.owned):
            raise NotAllowed(
                msg("This page runs only the models it lists; {ref!r} is not one of them.", ref=ref[:80]),
                msg("Choose one from the list."),
            )

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


def _is_listed(ref: str) -> bool:
    from lowmem.models.catalog import find
    from lowmem.models.source import local_models

    return find(ref) is not None or ref in [model.ref for model in local_models()]
