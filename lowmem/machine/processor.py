"""The processor: its name, the cores this process may use, and the dtypes it runs well."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from lowmem.machine.memory_limits import cpu_quota
from lowmem.messages import msg

# Instructions that multiply bf16 at least as fast as fp32; without them bf16 is emulated and slower.
_FAST_BF16 = {"avx512_bf16", "amx_bf16"}


def cores() -> int:
    """Cores this process may use: its affinity, within the cgroup's quota."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


@functools.cache
def name() -> str:
    """The product name of the processor: "AMD EPYC 7B13", "Intel Core i7-1165G7", "Apple M2"."""
    return clean_name(_cpuinfo().get("model name") or _name_without_cpuinfo()) or "CPU"


def clean_name(raw: str) -> str:
    """Without trademarks, clock speed, core count and filler: "Intel(R) Xeon(R) CPU @ 2.20GHz" -> "Intel Xeon"."""
    noise = r"\((?:R|TM|C)\)|@.*|\bwith Radeon.*|\b\S+-Core\b|\bProcessor\b|\bCPU\b"
    return " ".join(re.sub(noise, " ", raw, flags=re.IGNORECASE).split())


def dtypes() -> tuple[str, ...]:
    """The dtypes the processor runs well, best first."""
    return ("fp32", "bf16") if _FAST_BF16 & _flags() else ("fp32",)


def has_vnni() -> bool:
    """Whether int8 products accumulate in 32 bits (AVX-512 VNNI), which FBGEMM's kernels use.

    AVX2's VNNI (`avx_vnni`) does not count: FBGEMM has no kernel for it.
    """
    return "avx512_vnni" in _flags()


def note() -> str:
    """A limitation in one sentence, or ""."""
    flags = _flags()
    if "sse2" in flags and "avx2" not in flags:
        return msg("This processor has no AVX2: int8 does not run on it, and everything else is slow.")
    return ""


def _flags() -> set[str]:
    return set(_cpuinfo().get("flags", "").split())


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _name_without_cpuinfo() -> str:
    """On systems without the name in /proc/cpuinfo: macOS, Windows, ARM Linux."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
        if sys.platform == "win32":
            import winreg

            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.machine()
