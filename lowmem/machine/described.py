"""Describes a machine that is not here: a well-known card, or any GPU of a given size. Nothing is probed.

A description is a `Hardware` like that of this machine, so everything that plans for one plans for the other.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lowmem.errors import BadInput
from lowmem.machine.baseline import DEFAULT_RUNTIME_BYTES
from lowmem.machine.device import CPU, Device, Rates
from lowmem.machine.gpu import dtypes_of
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.units import GB, MB, MiB, format_bytes, parse_bytes

DRIVER_BYTES, DESKTOP_BYTES = 300 * MB, 300 * MB
"""GPU memory that the driver takes, and that a desktop takes on a card with a screen. `MemoryBudget.detect` leaves a reserve
beside them, as on this machine."""

DEFAULT_RAM_BYTES = 16 * GB
SYSTEM_RAM_BYTES = 2 * GB
"""RAM that the operating system and a desktop take."""

RAM_RATE = (10e9, 50e9)
"""Bytes per second of a laptop's single channel of DDR4, and of a desktop's two channels of DDR5."""

GENERIC_CAPABILITY = (7, 5)
"""Of a card that is known by its memory alone: the least that runs every precision but bf16."""

PCIE3_X16, PCIE4_X16, PCIE5_X16 = 15.75, 31.5, 63.0
"""GB/s, of the specification. Eight lanes carry half as much."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card as its maker specifies it.

    Args:
        name: its product name.
        mebibytes: its memory as nvidia-smi reports it.
        capability: CUDA compute capability.
        memory, bus: bandwidth of its memory, and of PCI Express with the lanes it has, in GB/s.
        aliases: other names.
        screen: whether it drives a desktop.
    """

    name: str
    mebibytes: int
    capability: tuple[int, int]
    memory: float
    bus: float
    aliases: tuple[str, ...] = ()
    screen: bool = True

    @property
    def nbytes(self) -> int:
        return self.mebibytes * MiB


# Memory, bandwidth and lanes from NVIDIA's data sheets and product pages, compute capability from
# https://developer.nvidia.com/cuda-gpus. T4, A10, L4 and the A-series show less than their nominal size: ECC takes a part.
CARDS = (
    Card("NVIDIA GeForce GTX 1060 6GB", 6144, (6, 1), 192, PCIE3_X16, ("1060",)),
    Card("NVIDIA GeForce GTX 1070", 8192, (6, 1), 256, PCIE3_X16),
    Card("NVIDIA GeForce GTX 1080 Ti", 11_264, (6, 1), 484, PCIE3_X16),
    Card("NVIDIA P100", 16_384, (6, 0), 732, PCIE3_X16, screen=False),
    Card("NVIDIA V100", 16_384, (7, 0), 900, PCIE3_X16, ("v100-16gb",), screen=False),
    Card("NVIDIA GeForce GTX 1650", 4096, (7, 5), 128, PCIE3_X16),
    Card("NVIDIA GeForce GTX 1660 Ti", 6144, (7, 5), 288, PCIE3_X16, ("1660",)),
    Card("NVIDIA GeForce RTX 2060", 6144, (7, 5), 336, PCIE3_X16),
    Card("NVIDIA GeForce RTX 2070", 8192, (7, 5), 448, PCIE3_X16),
    Card("NVIDIA GeForce RTX 2080", 8192, (7, 5), 448, PCIE3_X16),
    Card("NVIDIA GeForce RTX 2080 Ti", 11_264, (7, 5), 616, PCIE3_X16),
    Card("NVIDIA T4", 15_360, (7, 5), 320, PCIE3_X16, ("tesla-t4", "colab"), screen=False),
    Card("NVIDIA GeForce RTX 3050 Laptop", 4096, (8, 6), 192, PCIE4_X16 / 2, ("3050-4gb",)),
    Card("NVIDIA GeForce RTX 3050", 8192, (8, 6), 224, PCIE4_X16 / 2, ("3050-8gb",)),
    Card("NVIDIA GeForce RTX 3060 Laptop", 6144, (8, 6), 336, PCIE4_X16 / 2, ("3060-6gb",)),
    Card("NVIDIA GeForce RTX 3060", 12_288, (8, 6), 360, PCIE4_X16, ("3060-12gb",)),
    Card("NVIDIA GeForce RTX 3060 Ti", 8192, (8, 6), 448, PCIE4_X16),
    Card("NVIDIA GeForce RTX 3070", 8192, (8, 6), 448, PCIE4_X16),
    Card("NVIDIA GeForce RTX 3080", 10_240, (8, 6), 760, PCIE4_X16, ("3080-10gb",)),
    Card("NVIDIA GeForce RTX 3080 Ti", 12_288, (8, 6), 912, PCIE4_X16, ("3080-12gb",)),
    Card("NVIDIA GeForce RTX 3090", 24_576, (8, 6), 936, PCIE4_X16),
    Card("NVIDIA GeForce RTX 3090 Ti", 24_564, (8, 6), 1008, PCIE4_X16),
    Card("NVIDIA RTX A2000", 6138, (8, 6), 288, PCIE4_X16, ("a2000-6gb",)),
    Card("NVIDIA RTX A2000 12GB", 12_282, (8, 6), 288, PCIE4_X16),
    Card("NVIDIA RTX A4000", 16_376, (8, 6), 448, PCIE4_X16),
    Card("NVIDIA RTX A5000", 24_564, (8, 6), 768, PCIE4_X16),
    Card("NVIDIA RTX A6000", 49_140, (8, 6), 768, PCIE4_X16),
    Card("NVIDIA A10", 23_028, (8, 6), 600, PCIE4_X16, screen=False),
    Card("NVIDIA A10G", 23_028, (8, 6), 600, PCIE4_X16, screen=False),
    Card("NVIDIA A100 40GB", 40_960, (8, 0), 1555, PCIE4_X16, ("a100",), screen=False),
    Card("NVIDIA A100 80GB", 81_920, (8, 0), 1935, PCIE4_X16, screen=False),
    Card("NVIDIA GeForce RTX 4050 Laptop", 6141, (8, 9), 192, PCIE4_X16 / 2, ("4050",)),
    Card("NVIDIA GeForce RTX 4060", 8188, (8, 9), 272, PCIE4_X16 / 2, ("4060-laptop",)),
    Card("NVIDIA GeForce RTX 4060 Ti", 8188, (8, 9), 288, PCIE4_X16 / 2),
    Card("NVIDIA GeForce RTX 4060 Ti 16GB", 16_380, (8, 9), 288, PCIE4_X16 / 2),
    Card("NVIDIA GeForce RTX 4070", 12_282, (8, 9), 504, PCIE4_X16, ("4070-super",)),
    Card("NVIDIA GeForce RTX 4070 Ti", 12_282, (8, 9), 504, PCIE4_X16),
    Card("NVIDIA GeForce RTX 4070 Ti Super", 16_376, (8, 9), 672, PCIE4_X16),
    Card("NVIDIA GeForce RTX 4080", 16_376, (8, 9), 717, PCIE4_X16, ("4080-super",)),
    Card("NVIDIA GeForce RTX 4090", 24_564, (8, 9), 1008, PCIE4_X16),
    Card("NVIDIA L4", 23_034, (8, 9), 300, PCIE4_X16, screen=False),
    Card("NVIDIA L40S", 46_068, (8, 9), 864, PCIE4_X16, screen=False),
    Card("NVIDIA RTX 2000 Ada", 16_380, (8, 9), 224, PCIE4_X16 / 2),
    Card("NVIDIA RTX 4000 Ada", 20_475, (8, 9), 360, PCIE4_X16),
    Card("NVIDIA RTX 6000 Ada", 49_140, (8, 9), 960, PCIE4_X16),
    Card("NVIDIA H100", 81_559, (9, 0), 2039, PCIE5_X16, ("h100-80gb", "h100-pcie"), screen=False),
    Card("NVIDIA H100 SXM", 81_559, (9, 0), 3350, PCIE5_X16, screen=False),
    Card("NVIDIA H200", 143_771, (9, 0), 4800, PCIE5_X16, screen=False),
    Card("NVIDIA GeForce RTX 5060", 8151, (12, 0), 448, PCIE5_X16 / 2),
    Card("NVIDIA GeForce RTX 5060 Ti", 8151, (12, 0), 448, PCIE5_X16 / 2),
    Card("NVIDIA GeForce RTX 5060 Ti 16GB", 16_311, (12, 0), 448, PCIE5_X16 / 2),
    Card("NVIDIA GeForce RTX 5070", 12_227, (12, 0), 672, PCIE5_X16),
    Card("NVIDIA GeForce RTX 5070 Ti", 16_303, (12, 0), 896, PCIE5_X16),
    Card("NVIDIA GeForce RTX 5080", 16_303, (12, 0), 960, PCIE5_X16),
    Card("NVIDIA GeForce RTX 5090", 32_607, (12, 0), 1792, PCIE5_X16),
)


def card(name: str) -> Card:
    """The card of a name such as "t4", "3060", "rtx-a2000" or "NVIDIA H100".

    Raises:
        BadInput: no card has this name; the hint says the nearest names.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    near = difflib.get_close_matches(key, _BY_KEY, n=4, cutoff=0.5) or ["t4", "3060", "4060", "a2000"]
    names = dict.fromkeys(short_name(_BY_KEY[one]) for one in near)
    raise BadInput(
        msg("There is no GPU {name!r} in the table.", name=name[:40]),
        msg("The nearest are {names}; any other is described by its memory, such as 6G.", names=", ".join(names)),
    )


def short_name(one: Card) -> str:
    """A card's name as it is typed: "rtx-3060", "t4", "rtx-a2000-12gb"."""
    return re.sub(r"^(nvidia )?(geforce )?", "", one.name.lower()).replace(" ", "-")


def describe_machine(gpu: str = "", vram: str | float | None = None, ram: str | float | None = None) -> Hardware:
    """A machine with one GPU, as a `Hardware` to plan for; it cannot be run here.

    Args:
        gpu: the name of a card, see `card`; "" for any GPU with `vram`.
        vram: memory of the GPU, such as "6G"; by default that of the card.
        ram: RAM of the machine, such as "32G"; 16 GB by default.

    Raises:
        BadInput: an unknown card, neither a card nor its memory, or less memory than driver and desktop take.
    """
    if not gpu.strip() and not vram:
        raise BadInput(msg("No GPU is described."), msg("Name a card such as t4, or its memory such as 6G."))
    found = card(gpu) if gpu.strip() else None
    total = parse_bytes(vram) if vram else found.nbytes if found else 0
    device = _described(found, total) if found else _generic(total)
    ram_bytes = parse_bytes(ram) if ram else DEFAULT_RAM_BYTES
    cpu = Device(
        CPU, msg("CPU"), ram_bytes, _free("RAM", ram_bytes, SYSTEM_RAM_BYTES), ("fp32",), rates=Rates(memory=RAM_RATE)
    )
    return Hardware(
        host="local",
        cpu=cpu,
        gpus=(device,),
        cores=0,
        ram_limit="host",
        disk_free_bytes=0,
        disk_path="",
        process_bytes=0,
        runtime_bytes=DEFAULT_RUNTIME_BYTES,
    )


def _described(found: Card, total: int) -> Device:
    taken = DRIVER_BYTES + (DESKTOP_BYTES if found.screen else 0)
    dtypes, note = dtypes_of(found.capability)
    rates = Rates((found.memory * 1e9, found.memory * 1e9), (found.bus * 1e9, found.bus * 1e9))
    free = _free(msg("GPU memory"), total, taken)
    return Device("cuda:0", found.name, total, free, dtypes, note, found.capability, rates)


def _generic(total: int) -> Device:
    """A GPU of which only the memory is known: as fast as the slowest to the fastest card of about that size."""
    distance = min(abs(one.nbytes - total) for one in CARDS)
    alike = [one for one in CARDS if abs(one.nbytes - total) <= max(distance, total // 5)]
    dtypes, _ = dtypes_of(GENERIC_CAPABILITY)
    note = msg("Planned for compute capability 7.5, without bf16; the name of the card says more.")
    memory, bus = ([getattr(one, kind) * 1e9 for one in alike] for kind in ("memory", "bus"))
    rates = Rates((min(memory), max(memory)), (min(bus), max(bus)))
    free = _free(msg("GPU memory"), total, DRIVER_BYTES + DESKTOP_BYTES)
    return Device("cuda:0", msg("Generic GPU"), total, free, dtypes, note, GENERIC_CAPABILITY, rates)


def _free(memory: str, total: int, taken: int) -> int:
    if total <= taken:
        raise BadInput(
            msg(
                "A machine with {total} of {memory} has none left: its system takes {taken}.",
                total=format_bytes(total),
                memory=memory,
                taken=format_bytes(taken),
            ),
            msg("Describe a larger one."),
        )
    return total - taken


def _key(name: str) -> str:
    """A name without what people leave out: "NVIDIA GeForce RTX 3060 Ti" -> "3060ti"."""
    words = re.sub(r"\b(nvidia|geforce|tesla|quadro|rtx|gtx)\b", "", name.lower().replace("-", " ").replace("_", " "))
    return re.sub(r"^(rtx|gtx)(?=\w)|[^a-z0-9]", "", words.strip())


_BY_KEY = {_key(name): one for one in CARDS for name in (*one.aliases, one.name)}
