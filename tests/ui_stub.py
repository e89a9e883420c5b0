"""The page's engine with imaginary hardware and a session that only pretends: streams words, loads nothing.

python tests/ui_stub.py 7861    # look at the page without a model
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lowmem.errors import DoesNotFit
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.device import CPU, Device
from lowmem.machine.hardware import Hardware
from lowmem.machine.monitor import Snapshot
from lowmem.models.catalog import find
from lowmem.models.spec import ModelSpec
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Engine
from lowmem.units import GB, MB

TEXT = (
    "A KV cache keeps the keys and values of every token that the model has read, so that each new token "
    "is computed once instead of the whole text again. It grows with the context: "
    "two vectors per layer and token.\n\n```python\nbytes = 2 * layers * kv_heads * head_dim * 2\n```\n\n"
    "That is why a long conversation costs memory even when the model itself does not change. "
)
WORDS = TEXT.split(" ")


def close(demo: Any) -> None:
    """Close a page that was launched in this process. Gradio wakes what waits for that from a thread that is not theirs."""
    with suppress(RuntimeError):  # one of them left at that moment; the event is set all the same
        demo.app.stop_event.set()
    demo.close()


def machine(vram_gb: float = 0) -> Hardware:
    """Two cores, 8 GB, and a T4 of `vram_gb` when asked for."""
    cpu = Device(CPU, "AMD EPYC", 8 * GB, 7 * GB, ("fp32",))
    vram = int(vram_gb * GB)
    gpus = (Device("cuda:0", "NVIDIA T4", vram, vram - 300 * MB, ("fp16", "fp32")),) if vram else ()
    return Hardware("local", cpu, gpus, 2, "host", 41 * GB, "/imaginary", 180 * MB, 450 * MB)


class StubSession:
    """The engine's session as far as the page can tell."""

    def __init__(self, hardware: Hardware, delay: float = 0.02) -> None:
        self._hardware, self.delay = hardware, delay
        self.plan: Plan | None = None
        self.load_receipt: Receipt | None = None
        self.last_receipt: Receipt | None = None
        self.busy = ""
        self.cancelled = 0

    def hardware(self) -> Hardware:
        return self._hardware

    plan_for = Session.plan_for

    def load(self, plan: Plan, cancel: CancelToken | None = None, *, force: bool = False) -> Iterator[Step | Receipt]:
        if plan.verdict == "over" and not force:
            raise DoesNotFit(plan.sentence(), "Lower the context or try anyway.")
        for done in range(0, 539, 60):
            self._pause(cancel)
            yield Step(done * MB, 538 * MB, "Reading weights", "B")
        self.plan = plan
        self.load_receipt = self._receipt("load", 0, ("The embedding stays in fp32.",))
        yield self.load_receipt

    def set_budget(self, budget: MemoryBudget) -> None:
        assert self.plan is not None
        self.plan = replace(self.plan, budget=budget)

    def unload(self) -> Receipt | None:
        if self.plan is None:
            return None
        receipt = self._receipt("unload", 0)
        self.plan = None
        return receipt

    def estimate(self, prompt_tokens: int, options: GenerateOptions, batch: int = 1) -> Plan:
        from lowmem.planning.estimate import reestimate

        assert self.plan is not None
        return reestimate(
            self.plan,
            context=prompt_tokens + options.max_new_tokens,
            cache_type=options.cache_type if options.use_cache else "none",
        )

    def generate(
        self,
        prompt: Any,
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        *,
        raw: bool = False,
        force: bool = False,
    ) -> Iterator[Step | Chunk | Receipt]:
        if "boom" in str(prompt):
            raise ZeroDivisionError("a bug")
        assert self.plan is not None
        prompt_tokens = len(str(prompt)) // 4
        yield Step(prompt_tokens, prompt_tokens, "Reading the prompt", "tokens")
        words = itertools.islice(itertools.cycle(WORDS), options.max_new_tokens)
        for number, word in enumerate(words, start=1):
            if cancel and cancel.cancelled:
                self.cancelled += 1
                break
            time.sleep(self.delay)
            for index in range(options.num_return_sequences):
                finish = "length" if number == options.max_new_tokens else None
                yield Chunk(word + " ", index, prompt_tokens, number, self.plan.context, 0.42, 645.0, 29.8, finish)
        yield self._receipt("generate", number, snippet=f"session.generate({prompt!r})")

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
        for index, prompt in enumerate(prompts):
            self._pause(cancel)
            yield Step(index, len(prompts), "Answering", "prompts")
            yield Completion(index, prompt, f"An answer to {prompt}", new_tokens=7)
        yield self._receipt("batch", 7 * len(prompts), snippet=f"session.batch({prompts!r})")

    def _pause(self, cancel: CancelToken | None) -> None:
        (cancel or CancelToken()).wait(4 * self.delay)

    def _receipt(self, action: str, tokens: int, notes: tuple[str, ...] = (), snippet: str = "") -> Receipt:
        assert self.plan is not None
        measured = {memory: int(peak * 0.968) for memory, peak in self.plan.predicted.items()}
        speed = (
            {"prefill_tps": 645.0, "decode_tps": 29.8, "seconds_to_first": 0.42, "new_tokens": tokens} if tokens else {}
        )
        self.last_receipt = Receipt(
            action,
            self.plan.spec.name,
            self.plan.precision,
            self.plan.device,
            3.2,
            self.plan.predicted,
            measured,
            notes=notes,
            snippet=f"import lowmem\n\nsession = lowmem.load({self.plan.spec.ref!r})\n{snippet}",
            **speed,
        )
        return self.last_receipt


class StubEngine(Engine):
    """`Engine` on imaginary hardware; every model of the catalog is known without a network."""

    def __init__(self, vram_gb: float = 0, delay: float = 0.02, access: Access | None = None) -> None:
        hardware = machine(vram_gb)
        self.stub = StubSession(hardware, delay)
        super().__init__(lambda: self.stub, access=access)  # type: ignore[arg-type,return-value]

    def snapshot(self) -> Snapshot:
        resident = self.stub.plan.main.peak if self.stub.plan else 0
        vram = tuple((gpu.name, 300 * MB + resident, gpu.total_bytes) for gpu in self.stub.hardware().gpus)
        own = 180 * MB + (0 if vram else resident)
        return Snapshot(1 * GB + own, 8 * GB, 7 * GB - own, own, vram, 41 * GB)

    def _read_spec(self, ref: str, encoders: bool = False) -> ModelSpec:
        if entry := find(ref):
            return replace(entry.spec(), has_chat_template=entry.chat)
        return super()._read_spec(ref, encoders)

    def measure(self, measuring: Generator[Step, None, object]) -> None:
        """Imaginary hardware has no speed; measuring this machine would take a minute beside every page."""
        measuring.close()

    def download_bytes(self, spec: ModelSpec) -> int:
        return spec.size_on_disk if spec.ref == "demo" else 0


if __name__ == "__main__":
    from lowmem.ui.launch import launch_options
    from lowmem.ui.page import build_ui

    port, vram = (int(sys.argv[1]) if len(sys.argv) > 1 else 7861), float(sys.argv[2]) if len(sys.argv) > 2 else 0
    build_ui(StubEngine(vram)).launch(server_port=port, **launch_options())
