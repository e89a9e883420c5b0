"""What every test gets: a home of its own, no host's environment, no hub; and imaginary machines."""

from __future__ import annotations

import os

# Libraries read these once, while they are imported.
os.environ.update(
    GRADIO_ANALYTICS_ENABLED="False",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)
_HOST_VARIABLES = (
    "COLAB_RELEASE_TAG",
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "MEMORY",
    "SPACE_ID",
    "SPACES_ZERO_GPU",
    "SYSTEM",
)
for _name in _HOST_VARIABLES:
    os.environ.pop(_name, None)

import importlib.metadata  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

import memlimit  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

from lowmem.machine.device import CPU, Device  # noqa: E402
from lowmem.machine.hardware import Hardware  # noqa: E402
from lowmem.machine.memory_limits import share_budget_with  # noqa: E402
from lowmem.models import derive  # noqa: E402
from lowmem.units import GB, MB  # noqa: E402


def pytest_report_header() -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    packages = ("torch", "transformers", "gradio", "huggingface_hub")
    return "versions: " + ", ".join(f"{package} {version(package)}" for package in packages)


def machine(
    vram_gb: float | None = None,
    ram_gb: float = 16,
    cores: int = 2,
    host: str = "local",
    dtypes: tuple[str, ...] | None = None,
    *,
    name: str = "",
    disk_gb: float = 50,
    process_mb: float = 100,
    runtime_mb: float = 450,
) -> Hardware:
    """An imaginary machine, idle: all VRAM free, all RAM free but what this process holds.

    `dtypes` are the GPU's where there is one, else the CPU's.
    """
    process_bytes = int(process_mb * MB)
    cpu_dtypes = dtypes if dtypes and vram_gb is None else ("fp32",)
    cpu_name = name if name and vram_gb is None else "AMD EPYC"
    cpu = Device(CPU, cpu_name, int(ram_gb * GB), int(ram_gb * GB) - process_bytes, cpu_dtypes)
    gpus: tuple[Device, ...] = ()
    if vram_gb is not None:
        vram = int(vram_gb * GB)
        gpus = (Device("cuda:0", name or "NVIDIA T4", vram, vram, dtypes or ("fp16", "fp32")),)
    return Hardware(
        host=host,
        cpu=cpu,
        gpus=gpus,
        cores=cores,
        ram_limit="host",
        disk_free_bytes=int(disk_gb * GB),
        disk_path="/imaginary",
        process_bytes=process_bytes,
        runtime_bytes=int(runtime_mb * MB),
    )


@pytest.fixture(scope="session")
def made_up() -> Callable[..., Hardware]:
    """The factory of imaginary machines, see `machine`."""
    return machine


@pytest.fixture(scope="session")
def demo_home() -> Iterator[Path]:
    """A LOWMEM_HOME that outlives the session, so that the demo model is fetched once."""
    home = Path(os.environ.get("LOWMEM_TEST_HOME") or Path.home() / ".cache" / "lowmem-tests").resolve()
    home.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def anatomies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where derived anatomies are kept, by content, so that a model's own process need not derive those of earlier tests."""
    return tmp_path_factory.mktemp("anatomies")


@pytest.fixture(autouse=True)
def _own_home(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    anatomies: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tests marked `real` share the demo model's home; every other test starts from one with nothing but anatomies."""
    real = request.node.get_closest_marker("real") is not None
    home = request.getfixturevalue("demo_home") if real else tmp_path_factory.mktemp("home")
    if not real:
        (home / "anatomy").symlink_to(anatomies, target_is_directory=True)
    monkeypatch.setenv("LOWMEM_HOME", str(home))
    monkeypatch.setattr(derive, "IN_PROCESS", True)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the offline switch, for a test that brings its own hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if constants := sys.modules.get("huggingface_hub.constants"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def limited() -> Callable[..., memlimit.Result]:
    """`memlimit.run`, or a skip where memory cgroups cannot be made."""
    if reason := memlimit.unavailable():
        pytest.skip(reason)
    return memlimit.run


@pytest.fixture(scope="module", autouse=True)
def _no_worker_outlives_its_tests() -> Iterator[None]:
    """A page that a test leaves behind keeps its model's process, whose memory would count in the next module's."""
    yield
    share_budget_with([])
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.cmdline()[-1:] == ["lowmem.runtime"]:
                child.kill()
