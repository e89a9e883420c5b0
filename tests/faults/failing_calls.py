"""Every call that can fail, made to fail: the first, the second, ... read, write, rename, allocation or start, one at a time.

`Harness` is a process that has imported what the actions need, under a small library (failing_calls.c) that refuses the n-th
call of a kind. For each n it forks twice: once the action runs with the fault, once more without. Whatever the first run
met, the second must end with the bytes of an undisturbed one; and between the two nothing unfinished is visible.

    python -m tests.faults.failing_calls ACTION [FAULT]       every call, and what became of it
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import hashlib
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".c")
SMALLEST_ALLOCATION = 16_384
SECONDS = 60
"""A run that takes longer hangs."""

IMPORTED = (
    "lowmem.quant.pipeline",
    "lowmem.export.pipeline",
    "lowmem.runtime.loader",
    "lowmem.longctx.hidden",
    "transformers.models.llama.modeling_llama",
)

STARTS = 0
"""The kind of starts of processes and threads, which are counted in Python; the others are those of failing_calls.c."""


class Fault(NamedTuple):
    """Calls of a kind fail with an error; `lasting`: all from the n-th on, as on a disk that stays full."""

    kind: int
    error: int
    lasting: bool = False


READ, WRITE, RENAME, SYNC, MEMORY = range(1, 6)
FAULTS = {
    "disk full": Fault(WRITE, errno.ENOSPC, lasting=True),
    "write": Fault(WRITE, errno.EIO),
    "read-only": Fault(WRITE, errno.EROFS, lasting=True),
    "read": Fault(READ, errno.EIO),
    "rename": Fault(RENAME, errno.EIO),
    "sync": Fault(SYNC, errno.EIO),
    "memory": Fault(MEMORY, errno.ENOMEM),
    "start": Fault(STARTS, errno.EAGAIN),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one run whose call `n` failed.

    Args:
        ended: "finished" (the fault did no harm), "refused" (a `LowMemError`), or what must not be: "bug", "crashed", "hung".
        said: the sentence, or the traceback.
        problems: what was found afterwards that must not be.
    """

    n: int
    ended: str
    said: str = ""
    problems: tuple[str, ...] = ()


Work = Callable[[], object]
"""What is disturbed; the value that it returns is part of the result."""


class Action(NamedTuple):
    """Work on the models in a folder `inputs`, in a folder `work`.

    Args:
        begin: called with both; what a person has decided before the work begins, like a request, is made here.
        results: pattern of the result's files below `work`, which are complete or absent.
    """

    begin: Callable[[Path, Path], Work]
    results: str


# --- the actions


def _quantize(inputs: Path, work: Path, method: str) -> Work:
    from lowmem.quant.request import QuantizeRequest
    from lowmem.quant.run import quantize

    text = {"samples": 2, "length": 32}
    request = QuantizeRequest.validated(str(inputs / "llama"), method, {"group_size": 32}, text, out=work / "out")
    return lambda: _exhausted(quantize(request))


def _exhausted(events: Iterator[object]) -> None:
    for _ in events:
        pass


def _export(inputs: Path, work: Path, **options: Any) -> Work:
    from lowmem.export.request import ExportRequest
    from lowmem.export.run import export_model
    from lowmem.planning.graph_options import ExportOptions

    request = ExportRequest(str(inputs / "llama"), work / "out", ExportOptions(**options))
    return lambda: _exhausted(export_model(request))


def _fetch(_inputs: Path, _work: Path) -> Work:
    from lowmem.events import drain
    from lowmem.models.fetch import fetch

    os.environ["HF_HUB_OFFLINE"] = "0"
    return lambda: drain(fetch("acme/toy")).name


def _convert(inputs: Path, _work: Path) -> Work:
    from lowmem.events import drain
    from lowmem.models import convert_gguf
    from lowmem.models.fetch import fetch

    convert_gguf.run_child = _run_converter  # type: ignore[assignment]
    return lambda: drain(fetch(str(inputs / "toy.gguf"))).name


def _run_converter(command: list[str], note: str, *_: object, **__: object) -> Generator[Any, None, tuple[int, str]]:
    """`background.run_child` by fork: what the converter imports is here already."""
    from lowmem.events import Step
    from lowmem.models.convert_gguf import main

    yield Step(0, 0, note)
    with tempfile.TemporaryFile("w+") as log:
        if not (pid := os.fork()):
            os.dup2(log.fileno(), 2)
            status = 1
            try:
                main(*command[3:])
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.seek(0)
        return status, (log.read().splitlines() or [""])[-1]


def _hidden_states(inputs: Path, work: Path) -> Work:
    from lowmem.longctx.actions import hidden_states
    from lowmem.planning.goal import Goal
    from lowmem.runtime.session import Session

    session = Session()
    _exhausted(
        session.load(session.plan_for(str(inputs / "llama"), Goal(context=128, precision="fp32", backend="torch")))
    )
    text = "The quick brown fox. " * 8
    return lambda: _exhausted(hidden_states(session, text, 64, 32, work / "out.npy", layers=(0, -1)))


def _offload(inputs: Path, _work: Path) -> Work:
    from lowmem.events import Chunk
    from lowmem.generate.options import GenerateOptions
    from lowmem.offload.run import BlockPlacement, plan_for, run
    from lowmem.planning.goal import Goal
    from lowmem.runtime.session import Session

    session = Session()
    placement = BlockPlacement(disk=(0, 1), may_map=False)
    plan = plan_for(session, str(inputs / "llama"), Goal(context=64), placement=placement)
    options = GenerateOptions(greedy=True, max_new_tokens=4)
    events = run(session, plan, ["Once"], options, raw=True)
    return lambda: "".join(event.text for event in events if isinstance(event, Chunk))


ACTIONS = {
    "quantize": Action(partial(_quantize, method="rtn"), "out/*"),
    "quantize with calibration": Action(partial(_quantize, method="gptq"), "out/*"),
    "export": Action(partial(_export, precision="int8"), "out/*"),
    "export generic": Action(partial(_export, precision="int8", fused=False), "out/*"),
    "fetch": Action(_fetch, "home/models/acme--toy@*[0-9a-f]/*"),
    "convert": Action(_convert, "home/models/gguf--toy@*[0-9a-f]/*"),
    "hidden states": Action(_hidden_states, "out.npy"),
    "offload": Action(_offload, "none"),
}

SPARE = ("journal.json",)
"""Names that may be left beside a complete result, where deleting them failed."""

TIMED = ("README.md", "lowmem_export.json", "source.json")
"""Files of results that tell how long it took, or how much memory: they must be there, with any content."""


# --- one process per run


class _Library:
    """failing_calls.c, under which this process runs."""

    def __init__(self) -> None:
        self._calls = ctypes.CDLL(None)
        self._calls.counted_calls.restype = ctypes.c_long
        self._starts, self._fault, self._n = 0, FAULTS["start"], 0

    def fail(self, fault: Fault, n: int, folder: Path) -> None:
        """From now on the `n`-th call fails; 0 only counts."""
        self._starts, self._fault, self._n = 0, fault, n
        self._calls.fail_calls(
            fault.kind, ctypes.c_long(n), fault.lasting, fault.error, ctypes.c_size_t(SMALLEST_ALLOCATION),
            str(folder).encode(),
        )  # fmt: skip

    def stop(self) -> int:
        """All calls succeed again; returns how many were counted."""
        count = self._starts if self._fault.kind == STARTS else self._calls.counted_calls()
        self.fail(FAULTS["start"], 0, Path())
        return count

    def watch_starts(self) -> None:
        import _thread
        import threading

        def process(*arguments: Any) -> Any:
            self._count(OSError(self._fault.error, os.strerror(self._fault.error)))
            return fork(*arguments)

        def thread(*arguments: Any) -> Any:
            self._count(RuntimeError("can't start new thread"))
            return start(*arguments)

        fork, subprocess._fork_exec = subprocess._fork_exec, process  # type: ignore[attr-defined]
        start = _thread.start_new_thread
        _thread.start_new_thread = threading._start_new_thread = thread  # type: ignore[assignment,attr-defined]

    def _count(self, error: Exception) -> None:
        self._starts += self._fault.kind == STARTS
        if self._fault.kind == STARTS and self._n and self._starts == self._n:
            raise error


def _forked(work: Callable[[], Any]) -> tuple[int, Any, str]:
    """Run `work` in a fork: its exit status, its value (pickled), and what it wrote to standard error."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as log:
        if not (pid := os.fork()):
            signal.alarm(SECONDS)
            os.dup2(log.fileno(), 2)
            os.dup2(log.fileno(), 1)
            pickle.dump(work(), answer)
            answer.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        log.seek(0)
        return status, pickle.load(answer) if status == 0 else None, log.read().decode("utf-8", "replace")[-2000:]


@dataclass
class _Ran:
    ended: str
    said: str = ""
    value: object = None
    calls: int = 0


class Harness:
    """Runs actions in forks of this process. `inputs` has the models, `home` what a machine knows from earlier runs."""

    def __init__(self, root: Path) -> None:
        self.inputs, self._home, self._root = root / "inputs", root / "home", root
        self._work = root / "work"
        self._library = _Library()
        self._undisturbed: dict[str, tuple[object, dict[str, str], set[str]]] = {}

    def prepare(self) -> None:
        """Import what most actions import; `_begin` imports the rest."""
        for name in IMPORTED:
            importlib.import_module(name)
        self._library.watch_starts()
        os.environ["LOWMEM_HOME"] = str(self._work / "home")
        from lowmem.models import derive, hub

        derive.IN_PROCESS = True
        hub._client()

    def _begin(self, action: str) -> None:
        """Run undisturbed, twice: what was measured in the first run is known from then on."""
        if action in self._undisturbed:
            return
        for _ in range(2):
            self._clear()
            ran = self._run(action, None, 0, modules=True)
            assert ran.ended == "finished", ran.said
            for name in ran.value[1]:  # type: ignore[index]
                with suppress(Exception):
                    importlib.import_module(name)
            gc.collect()
            gc.freeze()  # else every collection in a fork copies the pages of all objects
            shutil.rmtree(self._home, ignore_errors=True)
            shutil.copytree(self._work / "home", self._home, ignore=shutil.ignore_patterns("models"))
        self._undisturbed[action] = (ran.value[0], self._results(action), self._names())  # type: ignore[index]

    def outcomes(self, action: str, fault: str, most: int = 0) -> Iterator[Outcome]:
        """Let call after call fail; `most` of them, spread evenly, or all."""
        self._begin(action)
        self._clear()
        calls = self._run(action, FAULTS[fault], 0).calls
        for n in _spread(calls, most):
            yield self._outcome(action, FAULTS[fault], n)

    def _outcome(self, action: str, fault: Fault, n: int) -> Outcome:
        self._clear()
        value, results, names = self._undisturbed[action]
        ran = self._run(action, fault, n)
        problems = []
        there = self._results(action)
        if there and there != results:
            problems.append(f"half-made: {_differences(there, results)}")
        if ran.ended == "finished" and (there, ran.value) != (results, value):
            problems.append(f"it finished with something else: {_differences(there, results)} {ran.value or ''}")
        if ran.ended != "finished" and there:
            shutil.rmtree(self._work)  # made, and failed afterwards: nothing to run again
            return Outcome(n, ran.ended, ran.said, tuple(problems))
        if ran.ended != "finished" or problems:
            again = self._run(action, None, 0)
            if again.ended != "finished":
                problems.append(f"again: {again.said}")
            elif (self._results(action), again.value) != (results, value):
                problems.append(f"again, something else: {_differences(self._results(action), results)}")
        if left := {name for name in self._names() - names if Path(name).name not in SPARE}:
            problems.append(f"left behind: {sorted(left)}")
        return Outcome(n, ran.ended, ran.said, tuple(problems))

    def _clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        shutil.copytree(self._home, self._work / "home") if self._home.exists() else None

    def _run(self, action: str, fault: Fault | None, n: int, modules: bool = False) -> _Ran:
        def work() -> _Ran:
            ran = _Ran("finished")
            run = ACTIONS[action].begin(self.inputs, self._work)
            if fault:
                self._library.fail(fault, n, self._root)
            try:
                value = run()
                ran.calls = self._library.stop()
                ran.value = (value, list(sys.modules)) if modules else value
            except Exception as error:
                ran.calls = self._library.stop()
                from lowmem.errors import LowMemError

                known = isinstance(error, LowMemError)
                ran.ended = "refused" if known else "bug"
                ran.said = str(error) if known else traceback.format_exc()
            return ran

        status, ran, log = _forked(work)
        if status == 0:
            return ran
        return _Ran("hung" if status == -signal.SIGALRM else "crashed", f"status {status}: {log}")

    def _results(self, action: str) -> dict[str, str]:
        found = [path for path in self._work.glob(ACTIONS[action].results) if path.is_file() and path.name not in SPARE]
        return {
            path.name: "" if path.name in TIMED else hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for path in found
        }

    def _names(self) -> set[str]:
        return {path.relative_to(self._work).as_posix() for path in self._work.rglob("*")}


def _spread(calls: int, most: int) -> list[int]:
    if not most or calls <= most:
        return list(range(1, calls + 1))
    return sorted({1 + round(index * (calls - 1) / (most - 1)) for index in range(most)})


def _differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))) or "the answer"


# --- the process of the harness


def compiled(folder: Path) -> Path | None:
    """The library, or None where there is no compiler."""
    compiler, library = shutil.which("cc"), folder / "failing_calls.so"
    if compiler is None or sys.platform != "linux":
        return None
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def toys_for(inputs: Path) -> dict[str, bytes]:
    """Write the models of the actions; returns the files of the one on the hub."""
    import test_models_gguf
    import toys
    import transformers

    toys.save_toy("llama", inputs / "llama")
    model = test_models_gguf.random_model(transformers.LlamaConfig(**test_models_gguf.SHAPE))
    test_models_gguf.write(inputs, model, "llama")
    return {file.name: file.read_bytes() for file in (inputs / "llama").iterdir()}


@contextmanager
def served(root: Path) -> Iterator[Callable[..., list[Outcome]]]:
    """A harness in a process of its own: call it with an action, a fault and the most calls to fail."""
    import fake_hub

    library = compiled(root)
    assert library is not None
    files = toys_for(root / "inputs")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with fake_hub.serve() as hub:
        hub.add("acme/toy", files)
        environment = os.environ | {
            "LD_PRELOAD": str(library), "PYTHONPATH": path, "HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-m", "tests.faults.failing_calls", "--serve", str(root)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None

            def ask(action: str, fault: str, most: int = 0) -> list[Outcome]:
                print(json.dumps([action, fault, most]), file=process.stdin, flush=True)
                found = []
                while answer := json.loads(process.stdout.readline()):
                    found.append(Outcome(**answer | {"problems": tuple(answer["problems"])}))
                return found

            try:
                yield ask
            finally:
                process.stdin.close()


def _serve(root: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    harness = Harness(root)
    harness.prepare()
    for line in sys.stdin:
        for outcome in harness.outcomes(*json.loads(line)):
            print(json.dumps(asdict(outcome)), file=answers, flush=True)
        print("null", file=answers, flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--serve", type=Path)
    options.add_argument("--most", type=int, default=0)
    options.add_argument("action", nargs="?", choices=ACTIONS)
    options.add_argument("fault", nargs="?", choices=FAULTS)
    wanted = options.parse_args()
    if wanted.serve:
        _serve(wanted.serve)
        return
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as ask:
        for action in [wanted.action] if wanted.action else ACTIONS:
            for fault in [wanted.fault] if wanted.fault else FAULTS:
                started, outcomes = time.monotonic(), ask(action, fault, wanted.most)
                seconds = time.monotonic() - started
                counts: dict[tuple[str, str], list[int]] = {}
                for one in outcomes:
                    said = "\n".join(one.said.strip().splitlines()[-7:])
                    counts.setdefault((one.ended, " | ".join((said, *one.problems))), []).append(one.n)
                print(f"== {action}, {fault}: {len(outcomes)} calls, {seconds:.0f} s")
                for (ended, said), which in counts.items():
                    print(f"   {ended} x{len(which)} ({', '.join(map(str, which[:6]))}): {said}")


if __name__ == "__main__":
    main()
