"""probe(): what it says of this machine, of containers, and of machines with GPUs that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import machine

from lowmem.machine import baseline, gpu, hardware, memory_limits, processor
from lowmem.machine.hardware import Hardware, probe
from lowmem.settings import settings
from lowmem.units import GB, MB, GiB, MiB

UNLIMITED_V1 = "9223372036854771712"


# --- this machine ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _own_home: None) -> None:
    """A home that does not exist yet, as on first use."""
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "home"))


def test_probe_agrees_with_psutil_and_is_cheap_to_repeat() -> None:
    found = probe()
    assert found.cpu.total_bytes <= psutil.virtual_memory().total
    assert 0 < found.cpu.free_bytes <= found.cpu.total_bytes
    assert found.cpu.dtypes[0] == "fp32"
    assert 1 <= found.cores <= (psutil.cpu_count() or 1)
    assert found.process_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert found.disk_free_bytes > 0
    assert found.disk_path == str(settings().home)
    assert not Path(found.disk_path).exists(), "probing writes nothing"


def test_probe_in_a_cgroup_sees_its_limit(limited: Callable[..., Any]) -> None:
    code = "import json; from lowmem.machine.hardware import probe; h = probe()\n"
    code += "print(json.dumps([h.cpu.total_bytes, h.cpu.free_bytes, h.ram_limit]))"
    result = limited(400 * MiB, [sys.executable, "-c", code])
    assert result.rc == 0, result.stderr
    total, free, limit = json.loads(result.stdout)
    assert (total, limit) == (400 * MiB, "cgroup")
    assert 300 * MiB < free < 400 * MiB


def test_the_limiter_kills_what_does_not_fit(limited: Callable[..., Any]) -> None:
    result = limited(64 * MiB, [sys.executable, "-c", "bytearray(200_000_000)"])
    assert (result.rc, result.oom_killed) == (-9, 1)
    assert limited(64 * MiB, ["true"]).oom_killed == 0


def test_probe_leaves_torch_alone() -> None:
    code = "import sys; from lowmem.machine.hardware import probe; probe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- RAM ------------------------------------------------------------------------------------------


@pytest.fixture
def fake_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """A /proc and /sys made of the given files, on a host with 64 GiB of which 60 are available."""
    memory = types.SimpleNamespace(total=64 * GiB, available=60 * GiB)
    monkeypatch.setattr(memory_limits.psutil, "virtual_memory", lambda: memory)

    def build(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "root"

    return build


def v1_group(folder: str, limit: object, used: int, inactive: int = 0, active: int = 0, mapped: int = 0) -> dict:
    stat = f"total_inactive_file {inactive}\ntotal_active_file {active}\ntotal_mapped_file {mapped}\n"
    folder = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def v2_group(folder: str, limit: object, used: int, inactive: int = 0, active: int = 0, mapped: int = 0) -> dict:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\nfile_mapped {mapped}\n"
    folder = f"sys/fs/cgroup{folder}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def test_without_a_limit_the_host_counts_less_what_is_mapped(fake_root: Callable) -> None:
    files = {"proc/self/cgroup": "4:memory:/\n0::/\n", "proc/meminfo": "MemTotal: 1 kB\nMapped:  1048576 kB\n"}
    found = memory_limits.ram(fake_root(files | v1_group("", UNLIMITED_V1, GiB)))
    assert (found.total_bytes, found.free_bytes, found.limit) == (64 * GiB, 59 * GiB, "host")


def test_a_missing_proc_means_no_limit(tmp_path: Path) -> None:
    assert memory_limits.ram(tmp_path).limit == "host"
    assert memory_limits.cpu_quota(tmp_path) is None


def test_v2_limit_and_idle_page_cache(fake_root: Callable) -> None:
    files = {"proc/self/cgroup": "0::/app\n"}
    files |= v2_group("/app", 4 * GiB, 3 * GiB, inactive=1 * GiB, active=1 * GiB, mapped=512 * MiB)
    found = memory_limits.ram(fake_root(files))
    # 3 GiB used, of which 1.5 GiB is page cache that nobody has mapped
    assert (found.total_bytes, found.free_bytes, found.limit) == (4 * GiB, 2.5 * GiB, "cgroup")


def test_v1_parent_group_binds(fake_root: Callable) -> None:
    files = {"proc/self/cgroup": "9:cpu,cpuacct:/job/step\n4:memory:/job/step\n0::/\n"}
    files |= v1_group("", UNLIMITED_V1, 9 * GiB)
    files |= v1_group("/job", 2 * GiB, 1 * GiB, inactive=256 * MiB)
    files |= v1_group("/job/step", 8 * GiB, 512 * MiB)
    found = memory_limits.ram(fake_root(files))
    assert (found.total_bytes, found.free_bytes, found.limit) == (2 * GiB, 1.25 * GiB, "cgroup")


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../other"])
def test_a_container_that_sees_the_hosts_path_reads_its_own_mount(fake_root: Callable, path: str) -> None:
    files = {"proc/self/cgroup": f"4:memory:{path}\n"} | v1_group("", 3 * GiB, GiB)
    assert memory_limits.ram(fake_root(files)).total_bytes == 3 * GiB


def test_an_overfull_group_has_nothing_free(fake_root: Callable) -> None:
    files = {"proc/self/cgroup": "0::/\n"} | v2_group("", GiB, 2 * GiB)
    assert memory_limits.ram(fake_root(files)).free_bytes == 0


def test_the_memory_variable_binds(fake_root: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_root({"proc/self/cgroup": "0::/\n"} | v2_group("", 30 * GiB, GiB))
    monkeypatch.setenv("MEMORY", "15Gi")
    found = memory_limits.ram(root)
    assert (found.total_bytes, found.limit) == (15 * GiB, "MEMORY")
    assert found.free_bytes == pytest.approx(15 * GiB - memory_limits.process_bytes(), abs=10 * MB)
    monkeypatch.setenv("MEMORY", "40Gi")
    assert memory_limits.ram(root).limit == "cgroup"
    monkeypatch.setenv("MEMORY", "plenty")
    assert memory_limits.ram(root).limit == "cgroup"


# --- processor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("AMD EPYC", "AMD EPYC"),
        ("AMD EPYC 7B13 64-Core Processor", "AMD EPYC 7B13"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "11th Gen Intel Core i7-1165G7"),
        ("AMD Ryzen 7 5800H with Radeon Graphics", "AMD Ryzen 7 5800H"),
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "Intel Xeon Platinum 8370C"),
        ("Apple M2\n", "Apple M2"),
        ("", ""),
    ],
)
def test_processor_names_are_for_people(raw: str, clean: str) -> None:
    assert processor.clean_name(raw) == clean


@pytest.mark.parametrize(
    ("flags", "dtypes", "note"),
    [
        ("sse2 avx avx2", ("fp32",), ""),
        ("sse2 avx2 avx512f avx512_bf16", ("fp32", "bf16"), ""),
        ("sse2 avx2 amx_bf16", ("fp32", "bf16"), ""),
        ("sse2 avx", ("fp32",), "no AVX2"),
        ("", ("fp32",), ""),
    ],
)
def test_processor_dtypes(monkeypatch: pytest.MonkeyPatch, flags: str, dtypes: tuple[str, ...], note: str) -> None:
    monkeypatch.setattr(processor, "_cpuinfo", lambda: {"flags": flags})
    assert processor.dtypes() == dtypes
    assert note in processor.note()
    assert bool(note) == bool(processor.note())


@pytest.mark.parametrize(("flags", "found"), [("avx2 avx_vnni", False), ("avx2 avx512_vnni", True), ("", False)])
def test_vnni_that_int8_kernels_use(monkeypatch: pytest.MonkeyPatch, flags: str, found: bool) -> None:
    monkeypatch.setattr(processor, "_cpuinfo", lambda: {"flags": flags})
    assert processor.has_vnni() is found


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cpu_quota(fake_root: Callable, files: dict[str, str], quota: float | None) -> None:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert memory_limits.cpu_quota(fake_root({"proc/self/cgroup": "1:cpu:/\n0::/\n"} | groups)) == quota


def test_cores_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_quota", lambda: 0.5)
    assert processor.cores() == 1


# --- GPUs that are not here -----------------------------------------------------------------------


class FakeNvml:
    """NVML with the given cards: (name, total, reserved, free, capability)."""

    nvmlMemory_v2 = 2  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: tuple, old_driver: bool = False) -> None:
        self.cards = cards
        self.old_driver = old_driver

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}{handle}{handle}-abc"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        raise self.NVMLError(f"no {uuid}")

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.cards[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:  # noqa: N802
        return list(self.cards[handle][4])

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> types.SimpleNamespace:  # noqa: N802
        if version and self.old_driver:
            raise self.NVMLError("function not found")
        _, total, reserved, free, _ = self.cards[handle]
        return types.SimpleNamespace(total=total, reserved=reserved, free=free)


T4 = ("Tesla T4", 15360 * MiB, 450 * MiB, 14000 * MiB, (7, 5))
RTX = ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144 * MiB, 144 * MiB, 5000 * MiB, (8, 6))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put cards in this machine, and a torch that can use them."""

    def put(*found: tuple, old_driver: bool = False, usable: bool = True) -> None:
        nvml = FakeNvml(*found, old_driver=old_driver)
        monkeypatch.setattr(gpu, "_nvml", lambda: nvml)
        monkeypatch.setattr(gpu, "_torch_reaches_gpus", lambda: usable)
        monkeypatch.setattr(gpu, "loaded_torch", lambda: None)

    return put


def test_a_t4_has_no_bf16(cards: Callable) -> None:
    cards(T4)
    (device,) = probe().gpus
    assert (device.key, device.name, device.kind) == ("cuda:0", "NVIDIA T4", "cuda")
    assert (device.total_bytes, device.free_bytes) == (14910 * MiB, 14000 * MiB)
    assert device.dtypes == ("fp16", "fp32")
    assert "bf16 is not supported" in device.note
    assert "7.5" in device.note


def test_the_largest_gpu_comes_first_and_keeps_its_key(cards: Callable) -> None:
    cards(RTX, T4)
    assert [(device.key, device.name) for device in probe().gpus] == [
        ("cuda:1", "NVIDIA T4"),
        ("cuda:0", "NVIDIA GeForce RTX 3060 Laptop GPU"),
    ]
    assert probe().gpus[1].dtypes == ("bf16", "fp16", "fp32")
    assert probe().line().startswith("NVIDIA T4 (1 of 2 GPUs) · 15.6 GB VRAM · ")


def test_an_old_driver_counts_its_reserve_in_the_total(cards: Callable) -> None:
    cards(T4, old_driver=True)
    assert probe().gpus[0].total_bytes == 15360 * MiB


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("-1", []),
        ("1", ["NVIDIA T4"]),
        ("1,0", ["NVIDIA T4", "NVIDIA GeForce RTX 3060 Laptop GPU"]),
        ("0,7,1", ["NVIDIA GeForce RTX 3060 Laptop GPU"]),
        ("GPU-111", ["NVIDIA T4"]),
        ("MIG-unknown", []),
    ],
)
def test_cuda_visible_devices(cards: Callable, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    cards(RTX, T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = probe().gpus
    assert [device.name for device in found] == names
    assert [device.key for device in found] == [f"cuda:{index}" for index in range(len(names))]


def test_a_torch_without_cuda_leaves_the_gpu_out_and_says_so(cards: Callable) -> None:
    cards(T4, usable=False)
    found = probe()
    assert found.gpus == ()
    assert found.device is found.cpu
    assert "NVIDIA T4" in found.cpu.note


@pytest.mark.parametrize(
    ("text", "reaches"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
    ],
)
def test_the_build_of_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reaches: bool
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(gpu, "loaded_torch", lambda: None)
    assert gpu._torch_built_for_gpus.__wrapped__() is reaches


def fake_torch(initialized: bool = True) -> types.SimpleNamespace:
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: initialized,
        device_count=lambda: 1,
        mem_get_info=lambda _: (3 * GB, 8 * GB),
        get_device_capability=lambda _: (9, 0),
        get_device_name=lambda _: "AMD Radeon PRO",
        memory_reserved=lambda _: 2 * GB,
        memory_stats=lambda _: {"active_bytes.all.current": GB},
    )
    return types.SimpleNamespace(cuda=cuda)


def test_without_nvml_a_loaded_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    monkeypatch.setattr(gpu, "loaded_torch", fake_torch)
    (device,) = probe().gpus
    assert (device.name, device.total_bytes) == ("AMD Radeon PRO", 8 * GB)


@pytest.mark.parametrize(("initialized", "reusable"), [(True, GB), (False, 0)])
def test_torchs_own_cache_counts_as_free(
    cards: Callable, monkeypatch: pytest.MonkeyPatch, initialized: bool, reusable: int
) -> None:
    cards(("NVIDIA L4", 24 * GB, 0, 10 * GB, (8, 9)))
    monkeypatch.setattr(gpu, "loaded_torch", lambda: fake_torch(initialized))
    assert probe().gpus[0].free_bytes == 10 * GB + reusable


def test_a_torch_that_is_being_imported_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    half = types.ModuleType("torch")
    half.__spec__ = types.SimpleNamespace(_initializing=True)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch", half)
    assert gpu.loaded_torch() is None


def test_zerogpu_is_described_and_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("ZeroGPU's main process reports made-up figures")

    monkeypatch.setattr(gpu, "_nvml", asked)
    monkeypatch.setattr(gpu, "loaded_torch", asked)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    found = probe()
    assert found.host == "zerogpu"
    assert (found.device.name, found.device.total_bytes, found.device.free_bytes) == ("ZeroGPU", 48 * GB, 48 * GB)
    assert found.device.note
    assert found.line().startswith("ZeroGPU · 48.0 GB VRAM · ")
    assert found.line().endswith(" · Space")


def test_an_apple_chip_shares_its_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(gpu.platform, "machine", lambda: "arm64")
    found = probe()
    assert (found.device.kind, found.device.dtypes) == ("mps", ("fp16", "fp32"))
    assert found.device.total_bytes == found.cpu.total_bytes
    assert "shared RAM" in found.line()


# --- the line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (machine(15.6, 12.7, host="colab"), "NVIDIA T4 · 15.6 GB VRAM · 12.7 GB RAM · 2 cores · Colab"),
        (machine(ram_gb=25.3), "AMD EPYC · 25.3 GB RAM · 2 cores"),
        (machine(ram_gb=16, cores=1, host="space"), "AMD EPYC · 16.0 GB RAM · 1 core · Space"),
    ],
)
def test_line(made: Hardware, line: str) -> None:
    assert made.line() == line


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert hardware.disk_free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        psutil.disk_usage(str(tmp_path)).free, rel=0.01
    )


# --- what torch costs -----------------------------------------------------------------------------


def test_runtime_bytes_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baseline.runtime_bytes() == baseline.DEFAULT_RUNTIME_BYTES
    monkeypatch.setattr(baseline, "_CHILD", "print('a warning'); print(345678901)")
    assert baseline.measure_runtime_bytes() == 345678901
    monkeypatch.setattr(baseline, "_CHILD", "raise SystemExit('measured twice')")
    assert baseline.measure_runtime_bytes() == 345678901
    assert probe().runtime_bytes == 345678901
    assert [path.name for path in settings().home.iterdir()] == ["runtime_bytes.json"]


@pytest.mark.parametrize("child", ["raise ImportError('torch')", "print('nonsense')", ""])
def test_runtime_bytes_without_a_working_torch(monkeypatch: pytest.MonkeyPatch, child: str) -> None:
    monkeypatch.setattr(baseline, "_CHILD", child)
    assert baseline.measure_runtime_bytes() == baseline.DEFAULT_RUNTIME_BYTES
    assert not settings().home.exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"torch": "many"}', "{"])
def test_a_spoilt_cache_is_measured_again(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    settings().home.mkdir(parents=True)
    (settings().home / "runtime_bytes.json").write_text(text)
    assert baseline.runtime_bytes() == baseline.DEFAULT_RUNTIME_BYTES
    monkeypatch.setattr(baseline, "_CHILD", "print(300000000)")
    assert baseline.measure_runtime_bytes() == 300_000_000


def test_the_measurement_itself() -> None:
    assert 100 * MB < baseline.measure_runtime_bytes() < 2 * GB
