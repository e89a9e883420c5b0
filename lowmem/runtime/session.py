"""The one resident model: load, price, generate, unload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.planning.plan import Plan

Message = dict[str, str]


class Session:
    """Owns the resident model and the lock that makes visitors queue.

    Every action is a generator that ends in a `Receipt`.
    """

    @property
    def plan(self) -> Plan | None:
        """The plan of the resident model, None when nothing is loaded."""
        raise NotImplementedError

    @property
    def load_receipt(self) -> Receipt | None:
        raise NotImplementedError

    @property
    def last_receipt(self) -> Receipt | None:
        raise NotImplementedError

    @property
    def busy(self) -> str:
        """What is going on now ("Loading ...", "Generating ..."), or ""."""
        raise NotImplementedError

    def load(self, plan: Plan, cancel: CancelToken | None = None, *, force: bool = False) -> Iterator[Step | Receipt]:
        """Fetch if need be, free the resident model, load. `force` ignores an "over" verdict.

        Raises:
            DoesNotFit: the plan exceeds its budget and `force` is off.
        """
        raise NotImplementedError

    def unload(self) -> Receipt | None:
        """Give the memory back; None when nothing was loaded. Idempotent."""
        raise NotImplementedError

    def price(self, prompt_tokens: int, options: GenerateOptions, batch: int = 1) -> Plan:
        """The resident plan re-priced for one action: context = prompt + max_new_tokens."""
        raise NotImplementedError

    def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        *,
        raw: bool = False,
        force: bool = False,
    ) -> Iterator[Step | Chunk | Receipt]:
        """Stream an answer. `raw` completes the text without the chat template.

        Raises:
            BadInput, DoesNotFit, OutOfMemory, CorruptModel (NaN logits), Cancelled before the first token.
        """
        raise NotImplementedError

    def batch(
        self,
        prompts: Sequence[str],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        *,
        raw: bool = False,
        batch_size: int | None = None,
        force: bool = False,
    ) -> Iterator[Step | Completion | Receipt]:
        """Answer many prompts; results come as each batch ends."""
        raise NotImplementedError
