"""Every named endpoint: one function over the page's services each, and the table that `publish` serves.

    from gradio_client import Client
    Client("http://127.0.0.1:7860").predict("The sky is", api_name="/generate")

A parameter of a dataclass type is built from what callers pass: `options` from a dictionary, any other from an argument
for each field, a `MemoryBudget` from sizes such as "4G". Fields declared with `option` are checked.
`cancel` is no argument; it is set when the caller leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lowmem.datasets.texts import MANUAL
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.export.request import ExportEstimate
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.options import StrategyOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.measure.options import MeasureOptions
from lowmem.messages import msg
from lowmem.planning.described import as_dict
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.plan import Plan
from lowmem.planning.what_runs import to_csv
from lowmem.quant import DEFAULT
from lowmem.quant.request import QuantizeRequest
from lowmem.sweep.grid import make_grid
from lowmem.ui.api.json import as_json, batch_so_far, each_event, text_so_far
from lowmem.ui.parts.failures import bounded
from lowmem.ui.service.described import DescribedRequest
from lowmem.ui.service.engine import AUTO, Choice
from lowmem.ui.service.longctx import TextSource
from lowmem.ui.service.offload import COMPARED, OffloadRequest
from lowmem.ui.service.prompts import checked
from lowmem.ui.service.results import push_result
from lowmem.ui.service.services import Services

Json = dict[str, Any]
Events = Iterator[Any]

# --- the machine and its model


def plan(services: Services, choice: Choice) -> Plan:
    """The plan for a model and a budget ("4G"; empty is all free memory), without loading anything."""
    return services.engine.plan(choice)


def plan_for(services: Services, request: DescribedRequest) -> Json:
    """The plan for a machine that is not here, with its speed and what to install there; it cannot be loaded."""
    found = services.described.plan(request)
    return as_json(found.plan) | as_dict(found)


def what_runs(services: Services, ram: str = "", *, cancel: CancelToken) -> Events:
    """What runs on 4, 6, 8, 12, 16 and 24 GB of GPU memory: {"cells": one for each model and size, "csv": the same}."""
    cancel.check()
    cells = services.described.what_runs(ram)
    yield {"cells": [cell.as_dict() for cell in cells], "csv": to_csv(cells)}


def load(services: Services, choice: Choice, force: bool = False, *, cancel: CancelToken) -> Events:
    """Load a model; yields progress, last of all {"receipt": ...}. `force` goes over the budget."""
    return services.engine.load(services.engine.plan(choice), cancel, force=force)


def unload(services: Services) -> Receipt | None:
    """Free the resident model's memory; the receipt, empty when nothing was loaded."""
    return services.engine.unload()


def models(services: Services) -> Json:
    """Models that the page lists, by reference; any other model of the hub may be named, too, where that is allowed."""
    return {"models": {ref: label for label, ref in services.engine.catalog()}}


def machine(services: Services) -> Json:
    """The machine: hardware, memory in use, the resident model."""
    engine, resident = services.engine, services.engine.resident
    return {
        "line": engine.hardware().line(),
        "hardware": asdict(engine.hardware()),
        "now": asdict(engine.snapshot()),
        "resident": as_json(resident) | {"model": engine.resident_ref} if resident else None,
        "busy": engine.busy,
    }


def receipt(services: Services) -> Receipt | None:
    """The last action's receipt, predicted and measured bytes included; empty before the first."""
    return services.engine.last_receipt


def stored(services: Services) -> Json:
    """What is stored on the machine's disk: {"stored": [{"key", "name", "kind", "nbytes"}]}, for the page's owner."""
    services.engine.access.require_owner(msg("Listing the disk"))
    return {"stored": [asdict(one) for one in services.engine.stored()]}


def delete(services: Services, key: str) -> Json:
    """Delete what /stored lists under `key`, for good; {"freed": bytes}."""
    return {"freed": services.engine.delete(key)}


# --- generating


def generate(
    services: Services, prompt: str, options: GenerateOptions, raw: bool = True, *, cancel: CancelToken
) -> Events:
    """Continue a text, or answer it with raw=False; yields the text so far, last of all with the receipt."""
    bounded(prompt)
    return services.engine.generate(prompt, options, cancel, raw=raw)


def chat(
    services: Services,
    message: str,
    history: list | None = None,
    system: str = "",
    options: GenerateOptions = GenerateOptions(),  # noqa: B008
    *,
    cancel: CancelToken,
) -> Events:
    """Answer in a conversation; `history` is a list of {"role", "content"}."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = [*opening, *map(_message, history or []), {"role": "user", "content": message}]
    bounded(message)
    bounded(*(one["content"] for one in messages))
    return services.engine.chat(messages, options, cancel)


def _message(value: Any) -> dict[str, str]:
    match value:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return {"role": role, "content": content}
    raise BadInput(
        msg("A message in the history is malformed."),
        msg('Write each as {"role": "user" or "assistant", "content": "..."}.'),
    )


def batch(
    services: Services,
    prompts: list,
    options: GenerateOptions,
    batch_size: int = 0,
    raw: bool = False,
    *,
    cancel: CancelToken,
) -> Events:
    """Answer many prompts; yields {"done", "total", "results"}, last of all with the receipt."""
    texts = checked([str(prompt) for prompt in prompts])
    bounded(*texts)
    yield Step(0, len(texts), "", "prompts")
    yield from services.engine.batch(texts, options, cancel, raw=raw, batch_size=batch_size)


def verify(services: Services, original: str = "", *, cancel: CancelToken) -> Events:
    """Measure each claim about the resident model; yields steps and claims, last of all {"receipt": ...}: the report is in
    its details. `original` names the model that was quantized or exported, where the checkpoint does not."""
    return services.verify.verify(cancel, original.strip())


# --- quantizing and comparing


@dataclass(frozen=True, slots=True)
class QuantizeArguments:
    """The arguments that describe a quantization."""

    model: str
    method: str = DEFAULT
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    calibration: str = MANUAL
    samples: int = 64
    sequence_length: int = 512
    options: dict | None = None
    budget: MemoryBudget = UNLIMITED
    restart: bool = False
    embedding_bits: int = 8

    def request(self, services: Services) -> QuantizeRequest:
        options = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        text = {"text": self.calibration, "samples": self.samples, "length": self.sequence_length}
        return services.quantize.request(
            self.model.strip(),
            self.method,
            options | (self.options or {}),
            text,
            self.budget,
            self.restart,
            self.embedding_bits,
        )


def quantize(services: Services, arguments: QuantizeArguments, *, cancel: CancelToken) -> Events:
    """Quantize a model; yields progress, last of all {"receipt": ...} whose details name the folder."""
    return services.quantize.quantize(arguments.request(services), cancel)


def estimate_quantize(services: Services, arguments: QuantizeArguments) -> Json:
    """Size, memory and time of a quantization, in bytes and seconds; reads no weight."""
    found = as_json(services.quantize.estimate(arguments.request(services)))
    return found | {"estimate": found}


def compare(
    services: Services,
    model: str,
    variants: list,
    text: str = MANUAL,
    options: MeasureOptions = MeasureOptions(),  # noqa: B008
    budget: MemoryBudget = UNLIMITED,
    *,
    cancel: CancelToken,
) -> Events:
    """Measure variants such as "fp32", "int8", "gptq:4:64"; yields steps and rows, last of all the receipt."""
    return services.compare.compare(model.strip(), list(map(str, variants)), text, options, budget, cancel)


def sweep(
    services: Services,
    models: list,
    precisions: list | None = None,
    methods: dict | None = None,
    text: str = MANUAL,
    options: dict | None = None,
    workers: int = 0,
    budget: MemoryBudget = UNLIMITED,
    *,
    cancel: CancelToken,
) -> Events:
    """Measure models x (precisions, methods x settings), as many in parallel as fit; yields steps and rows, last of all the receipt, whose details hold the table."""
    content = {"models": models, "precisions": precisions or [], "methods": methods or {}, "text": text}
    grid = make_grid(content | {"measure": options or {}, "reference": services.compare.reference()})
    return services.compare.sweep(grid, budget, cancel, int(workers))


def inspect_weights(
    services: Services, model: str = "demo", bits: int = 4, group_size: int = 64, *, cancel: CancelToken
) -> Events:
    """What rounding to nearest does to a model's own weights; last of all {"layer", "edges", "before", "after", "losses"}."""
    return services.quantize.inspect_weights(model.strip(), int(bits), int(group_size), cancel)


def push(services: Services, folder: str, repo: str, token: str = "", private: bool = True) -> Json:
    """Upload a quantized or exported folder to the hub; for the page's owner. Returns {"address": ...}."""
    upload = push_result(services.engine.access, folder, repo, token, private, CancelToken())
    return {"address": next(upload)}


# --- offloading


def offload_plan(services: Services, request: OffloadRequest, again: bool = False) -> Json:
    """Where the blocks would live, and seconds per token where this machine was measured; loads nothing."""
    plan = services.offload.plan(request)
    speed = services.offload.measure(plan, again)
    placement = {"blocks": list(plan.placement.blocks), "mapped": plan.placement.mapped} if plan.placement else None
    pace = asdict(speed) | {"seconds_per_token": speed.seconds_per_token, "bound_by": speed.bound_by} if speed else None
    return as_json(plan) | {"batch": plan.batch, "placement": placement, "speed": pace}


def offload(
    services: Services,
    prompt: str,
    model: str = "demo",
    new_tokens: int = 32,
    budget: MemoryBudget = UNLIMITED,
    disk_blocks: str = "",
    ram_blocks: str = "",
    num_return_sequences: int = 1,
    *,
    cancel: CancelToken,
) -> Events:
    """Load with blocks where the budget, or a list like "0-5,9", says, and continue a text; last {"receipt": ...}."""
    bounded(prompt)
    request = OffloadRequest(model.strip(), budget, disk_blocks, ram_blocks, num_return_sequences)
    return services.offload.run(request, prompt, new_tokens, cancel)


def offload_compare(
    services: Services,
    prompt: str,
    model: str = "demo",
    new_tokens: int = 16,
    budget: MemoryBudget = UNLIMITED,
    methods: list | None = None,
    *,
    cancel: CancelToken,
) -> Events:
    """One prompt by every method, each in its own child process; yields steps, and a receipt or "error" for each."""
    bounded(prompt)
    chosen = COMPARED if methods is None else list(map(str, methods))
    return services.offload.compare(OffloadRequest(model.strip(), budget), prompt, new_tokens, cancel, chosen)


# --- long texts; unbounded generation and batches with a window are options of /generate and /batch


def perplexity(
    services: Services,
    text: str = "",
    window: int = 1024,
    stride: int = 0,
    sinks: int = 4,
    cache_type: str = "same",
    address: str = "",
    *,
    cancel: CancelToken,
) -> Events:
    """Perplexity along a text: in windows with a stride, or read once through the cache where stride is 0."""
    options = build(GenerateOptions, {"window": window, "sinks": sinks, "cache_type": cache_type})
    return services.longctx.perplexity(TextSource(text, address=address), options, stride, cancel)


def hidden_states(
    services: Services,
    text: str = "",
    window: int = 1024,
    stride: int = 512,
    layers: list | None = None,
    format: str = "npy",
    address: str = "",
    *,
    cancel: CancelToken,
) -> Events:
    """Hidden states window by window into a file, which the receipt's details name ("file")."""
    chosen = [int(layer) for layer in layers or (-1,)]
    return services.longctx.hidden_states(TextSource(text, address=address), window, stride, chosen, format, cancel)


def recall(
    services: Services, window: int = 1024, sinks: int = 4, cache_type: str = "same", *, cancel: CancelToken
) -> Events:
    """Is a fact recalled half a window later, and two windows later? With window 0: 2,048 tokens later."""
    options = build(GenerateOptions, {"window": window, "sinks": sinks, "cache_type": cache_type})
    return services.longctx.recall(options, cancel)


def compare_strategies(
    services: Services,
    model: str = "demo",
    options: StrategyOptions = StrategyOptions(),  # noqa: B008
    ram: str = "",
    precision: str = AUTO,
    text: str = "",
    address: str = "",
    *,
    cancel: CancelToken,
) -> Events:
    """Read a text with five cache strategies, each in its own child process; yields steps and points, last of all the receipt."""
    source = TextSource(text, address=address)
    return services.longctx.compare_strategies(model, source, options, MemoryBudget.parse(ram), cancel, precision)


# --- exporting


@dataclass(frozen=True, slots=True)
class ExportArguments:
    """The arguments that describe an export."""

    model: str
    format: str = "onnx"
    precision: str = "int8"
    options: dict | None = None
    budget: MemoryBudget = UNLIMITED

    def described(self) -> tuple[str, ExportOptions, MemoryBudget]:
        """What the service takes."""
        options = {"format": self.format, "precision": self.precision} | (self.options or {})
        return self.model.strip(), build(ExportOptions, options), self.budget


def estimate_export(services: Services, arguments: ExportArguments) -> ExportEstimate:
    """Size, memory and time of an export, in bytes and seconds; writes nothing."""
    return services.export.estimate(*arguments.described())


def export(services: Services, arguments: ExportArguments, *, cancel: CancelToken) -> Events:
    """Export a model as a graph and verify it; yields progress, last of all {"receipt": ...} whose details name the folder."""
    return services.export.export(*arguments.described(), cancel)


def benchmark(
    services: Services, folder: str, model: str = "demo", budget: MemoryBudget = UNLIMITED, *, cancel: CancelToken
) -> Events:
    """Time an exported graph against PyTorch; yields progress, last of all {"prompts", "torch", "onnx"}."""
    return services.export.benchmark(folder, model.strip(), budget, cancel)


# --- the table


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint, named after its function.

    Args:
        lane: what its events wait for, an attribute of the engine; "" where nothing waits.
        view: batches of events -> what the caller gets, for functions that return events.
    """

    run: Callable[..., Any]
    lane: str = ""
    view: Callable[[Iterator[list[Any]]], Iterator[Json]] = each_event

    @property
    def name(self) -> str:
        return self.run.__name__


ENDPOINTS = (
    *(Endpoint(run) for run in (plan, plan_for, models, machine, receipt, stored, delete, push, unload)),
    *(Endpoint(run) for run in (estimate_quantize, estimate_export, offload_plan)),
    Endpoint(what_runs, "planning"),
    Endpoint(generate, "lane", text_so_far),
    Endpoint(chat, "lane", text_so_far),
    Endpoint(batch, "lane", batch_so_far),
    *(Endpoint(run, "lane") for run in (load, quantize, compare, sweep, inspect_weights, offload)),
    *(Endpoint(run, "lane") for run in (offload_compare, perplexity, hidden_states, recall, compare_strategies)),
    *(Endpoint(run, "lane") for run in (export, benchmark, verify)),
)

RENAMED = {
    "forecast": "estimate_quantize",
    "export_forecast": "estimate_export",
    "look": "inspect_weights",
    "exercise": "compare_strategies",
    "race": "benchmark",
}
"""Deprecated endpoint -> current one. The deprecated one works for one release and logs a warning."""
