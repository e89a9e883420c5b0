"""Memory that runs out is recognized in every library, and no other sentence takes its place."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from lowmem.__main__ import main
from lowmem.cli import generate
from lowmem.errors import OutOfMemory, is_out_of_memory
from lowmem.events import CancelToken
from lowmem.machine.direct_io import Shard
from lowmem.runtime.session import Session
from lowmem.runtime.worker import Call, Ended, answer

MB = 1_000_000


def raised(fail: object) -> Exception:
    try:
        fail()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("it worked")


def onnxruntime_error() -> Exception:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    return RuntimeException(
        "[ONNXRuntimeError] : 6 : BFCArena: Failed to allocate memory for requested buffer of size 9"
    )


@pytest.mark.parametrize(
    "error",
    [
        raised(lambda: np.empty(1 << 60, np.uint8)),
        raised(lambda: torch.empty(1 << 55, dtype=torch.uint8)),
        RuntimeError("std::bad_alloc"),
        RuntimeError("bad allocation"),
        onnxruntime_error(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("could not create a primitive"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_library_runs_out_of_memory_in_its_own_words(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad_alloc"),
        OSError(errno.ENOENT, "gone"),
        RuntimeError("shape mismatch"),
        KeyError("out"),
        RuntimeError("could not create a primitive descriptor for the matmul primitive."),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


CAPPED = """
import resource, sys
sys.path[:0] = {path!r}
{before}
from lowmem.errors import is_out_of_memory
pages = open("/proc/self/statm").read().split()
limit = int(pages[5]) * resource.getpagesize() + 40_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    {body}
except Exception as error:
    print(is_out_of_memory(error), type(error).__name__, str(error)[:200])
else:
    print("it worked")
"""


def capped(before: str, body: str) -> str:
    """What a child with 40 MB to spare says of the error of `body`."""
    code = CAPPED.format(path=sys.path, before=before, body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_DATA")


@linux
def test_a_model_that_cannot_be_built_for_memory_is_no_unknown_family(tmp_path: Path):
    """Some families allocate buffers while they are built."""
    folder = toys.save_toy("llama", tmp_path)
    before = f"""
from pathlib import Path
import torch, transformers
from lowmem.models.modules import empty_model
folder = Path({str(folder)!r})
transformers.AutoModelForCausalLM.from_config = lambda *_, **__: torch.ones(50_000_000, device="cpu")
"""
    assert capped(before, "empty_model(folder)").startswith("True RuntimeError")


@linux
def test_a_graph_that_runs_out_of_memory_says_so(tmp_path: Path):
    import onnx
    from onnx import TensorProto, helper

    path = tmp_path / "large.onnx"
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["x"]), helper.make_node("Abs", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "large", [shape], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    before = (
        "import numpy as np\nfrom pathlib import Path\nfrom lowmem.runtime.onnx.model import open_session\n"
        f"session = open_session(Path({str(path)!r}))"
    )
    said = capped(before, "session.run(None, {'shape': np.array([200_000_000])})")
    assert said.startswith("True "), said


@linux
def test_arrays_and_mapped_memory_under_a_cap():
    assert capped("import numpy as np", "np.ones(100_000_000)").startswith("True ")
    assert capped("import mmap", "mmap.mmap(-1, 1_000_000_000, mmap.MAP_PRIVATE)").startswith("True OSError")


def test_a_read_without_memory_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights"
    path.write_bytes(bytes(8192))
    shard = Shard(path)

    def failing(*_: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("lowmem.machine.direct_io._read_some", failing)
    with pytest.raises(OSError, match="Cannot allocate") as caught:
        shard.read(0, memoryview(bytearray(4096)), 4096)
    assert is_out_of_memory(caught.value)
    shard.close()


def exhausted(*_: object, **__: object) -> object:
    raise MemoryError("std::bad_alloc")
    yield


def test_the_worker_and_the_command_line_name_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    *_, ended = answer(Session(), Call(exhausted), CancelToken())
    assert isinstance(ended, Ended)
    with pytest.raises(OutOfMemory, match="Memory ran out"):
        ended.raise_failure()
    monkeypatch.setattr(generate.Session, "load", exhausted)
    monkeypatch.setattr("lowmem.cli.plan.measure_runtime_bytes", lambda: 0)
    assert main(["generate", "demo", "--prompt", "Hello"]) == 3
    said = capsys.readouterr().err
    assert "Memory ran out." in said
    assert "Traceback" not in said
