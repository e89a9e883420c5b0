"""A process that renders chat templates: `python -m lowmem.generate.template_process`, started by `generate.templates`.

A chat template is a program that comes with a model. jinja2's sandbox keeps it from files and from Python's internals, but
not from computing without end or from strings of gigabytes. So each rendering has `SECONDS` of time, after which a
signal ends this process wherever it is, and the process has `MEMORY_BYTES`. It loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import signal
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lowmem.background import limit_process
from lowmem.machine.child import claim_output, offer_to_be_killed_first

SECONDS = 2.0
MEMORY_BYTES = 256 * 2**20
LONGEST_ADDED = 100_000
"""Characters that a rendering may have beyond twice those of its request: templates add some thousands."""

IDLE_SECONDS = 30
"""Without a request for this long, the process ends and its memory is free."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; rendering leaves it as it is."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the names
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"A namespace has no {name!r}.")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """A chat template in the environment that transformers gives it (transformers.utils.chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def rendered(request: dict[str, Any]) -> dict[str, str]:
    """{"text"}, or why there is none: {"refused": the template's own sentence} or {"failed": what went wrong}."""
    try:
        return {"text": compiled(request["template"]).render(**request["values"])}
    except TemplateError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": "memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def main() -> None:
    channel = claim_output()
    offer_to_be_killed_first()
    with suppress(ValueError, OSError):
        limit_process(MEMORY_BYTES)
    channel.write(b"ready\n")
    channel.flush()
    with open(0, "rb", closefd=False) as requests:
        while True:
            _end_after(IDLE_SECONDS)
            line = requests.readline()
            if not line:
                return
            _end_after(SECONDS)
            answer = rendered(json.loads(line))
            if len(answer.get("text", "")) > 2 * len(line) + LONGEST_ADDED:
                answer = {"failed": "memory"}
            channel.write(json.dumps(answer).encode() + b"\n")
            channel.flush()


def _end_after(seconds: float) -> None:
    """SIGALRM ends the process, even in the middle of one long operation."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
