"""The table of endpoints as gradio serves it: arguments in, JSON out, failures as sentences, each written once."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import gradio as gr

from lowmem.events import CancelToken
from lowmem.fields import build, describe
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import join
from lowmem.ui.api.arguments import RENAMED_ARGUMENTS, described
from lowmem.ui.api.checks import checked
from lowmem.ui.api.endpoints import ENDPOINTS, RENAMED, Endpoint
from lowmem.ui.api.json import Json, as_json
from lowmem.ui.parts.event_settings import UNLIMITED
from lowmem.ui.parts.failures import explain
from lowmem.ui.parts.worker import pump
from lowmem.ui.service.services import Services

log = logging.getLogger("lowmem.ui.api")

Arguments = list[inspect.Parameter]
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def publish(services: Services) -> None:
    """Add every endpoint, by its name and its earlier one, to the Blocks that is being built."""
    for endpoint in ENDPOINTS:
        gr.api(_served(endpoint, services), api_name=endpoint.name, **UNLIMITED)
    by_name = {endpoint.name: endpoint for endpoint in ENDPOINTS}
    for old, new in RENAMED.items():
        served = _served(by_name[new], services, renamed=_renaming(f"/{old}", f"/{new}"))
        served.__name__ = old
        gr.api(served, api_name=old, **UNLIMITED)


def _renaming(old: str, new: str) -> str:
    return f"{old} is now called {new}; the old name will be removed."


def _served(endpoint: Endpoint, services: Services, renamed: str = "") -> Callable[..., Any]:
    """The endpoint's function as `gr.api` takes it: plain arguments, JSON, and a sentence for every failure."""
    hints = get_type_hints(endpoint.run)
    parameters = list(inspect.signature(endpoint.run).parameters.values())[1:]  # the first is the services
    streams = "cancel" in hints
    taken = [argument for one in parameters for argument in _arguments(one.name, hints[one.name], one.default)]
    taken += _deprecated(taken)
    signature = inspect.Signature(taken, return_annotation=Iterator[dict] if streams else dict)

    def answers(*args: Any, **kwargs: Any) -> Iterator[Json]:
        try:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if note := " ".join(filter(None, [renamed, *_rename(bound.arguments)])):
                log.warning(note)
            token = CancelToken()
            values = {one.name: _value(one.name, hints[one.name], bound.arguments, token) for one in parameters}
            result = endpoint.run(services, **values)
            if endpoint.lane:
                result = services.engine.in_turn(result, token, endpoint.lane)
            found = endpoint.view(pump(result, token)) if streams else iter([as_json(result)])
            yield from ({**one, "renamed": note} if note else one for one in found)
        except Exception as error:
            raise gr.Error(join(" ", filter(None, explain(error))), print_exception=False) from None

    def answer(*args: Any, **kwargs: Any) -> Json:
        return next(answers(*args, **kwargs))

    run: Any = answers if streams else answer
    run.__name__ = endpoint.name
    run.__signature__ = signature
    run.__annotations__ = {one.name: one.annotation for one in taken} | {"return": signature.return_annotation}
    run.__doc__ = described(endpoint.name, renamed or inspect.getdoc(endpoint.run) or "", [one.name for one in taken])
    return run


def _deprecated(taken: Arguments) -> Arguments:
    """The earlier names of arguments, after all others."""
    by_name = {one.name: one for one in taken}
    return [
        inspect.Parameter(old, POSITIONAL, default=None, annotation=by_name[new].annotation | None)
        for old, new in RENAMED_ARGUMENTS.items()
        if new in by_name
    ]


def _rename(arguments: dict[str, Any]) -> Iterator[str]:
    """Move what was passed under an earlier name to the current one; yields a sentence for each."""
    for old, new in RENAMED_ARGUMENTS.items():
        if arguments.get(old) is not None:
            arguments[new] = arguments[old]
            yield _renaming(old, new)


def _arguments(name: str, hint: Any, default: Any) -> Arguments:
    """What callers pass for a parameter of an endpoint's function, or for a field of its dataclass."""
    if hint is CancelToken:
        return []
    if hint is MemoryBudget:
        return [inspect.Parameter(memory, POSITIONAL, default="", annotation=str) for memory in ("ram", "vram")]
    if not dataclasses.is_dataclass(hint):
        return [inspect.Parameter(name, POSITIONAL, default=default, annotation=hint)]
    if name == "options":
        return [inspect.Parameter(name, POSITIONAL, default=None, annotation=dict | None)]
    types, fields = get_type_hints(hint), dataclasses.fields(hint)
    required = dataclasses.MISSING
    defaults = {field.name: inspect.Parameter.empty if field.default is required else field.default for field in fields}
    return [one for key, default in defaults.items() for one in _arguments(key, types[key], default)]


def _value(name: str, hint: Any, arguments: dict[str, Any], token: CancelToken) -> Any:
    """What an endpoint's function gets for a parameter.

    Raises:
        BadInput: a value is outside its range.
    """
    if hint is CancelToken:
        return token
    if hint is MemoryBudget:
        return MemoryBudget.parse(arguments["ram"], arguments["vram"])
    if not dataclasses.is_dataclass(hint):
        return checked(name, hint, arguments[name])
    kind: Any = hint
    if name == "options":
        return build(kind, checked(name, dict | None, arguments[name]) or {})
    types = get_type_hints(kind)
    values = {key: _value(key, types[key], arguments, token) for key in types}
    options = {one.name: values.pop(one.name) for one in describe(kind)}
    return dataclasses.replace(build(kind, options), **values) if options else kind(**values)
