"""The interface of a quantization method: its options, where it runs, how it quantizes and how the result is stored.

A method sees the weights of layers that share an input, and statistics of that input. It knows nothing of files,
models or the pipeline. Imports no torch, so that forms and command lines can be built without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.quant.hessian import Hessian

BITS = (2, 3, 4, 8)
SMALLEST_GROUP = 16

RATIOS = 20
"""Exponents that activation-aware scaling tries, as in the published code."""

SAMPLED_ROWS = 1024
"""Rows on which it tries them, spread over all weights."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options that every method has; a method's own subclass adds to them."""

    bits: int = option(4, msg("Bits"), msg("Bits per weight: 2 (experimental), 3, 4 or 8."), low=2, high=8, step=1)
    group_size: int = option(
        64,
        msg("Group size"),
        msg("Weights that share a scale: smaller groups are more accurate and take more space; -1 is a whole row."),
        low=-1,
        high=4096,
        step=1,
    )
    symmetric: bool = option(
        False, msg("Symmetric"), msg("Without zero points: slightly less precise, supported by more programs.")
    )

    @property
    def scale_channels(self) -> bool:
        """Whether activation-aware scaling comes first (see `scaling.py`); methods that offer it make it an option."""
        return False

    def check(self) -> None:
        """Check values that are within the fields' ranges but that no format can store.

        Raises:
            BadInput: naming the value and those that can be stored.
        """
        if self.bits not in BITS:
            raise BadInput(
                msg("Weights cannot be stored in {bits} bits.", bits=self.bits),
                msg("Use {bits}.", bits=", ".join(map(str, BITS))),
            )
        if self.group_size != -1 and self.group_size < SMALLEST_GROUP:
            raise BadInput(
                msg(
                    "The scales of groups of {group_size} weights would take more space than quantizing saves.",
                    group_size=self.group_size,
                ),
                msg("Use {smallest_group} or more, or -1 for a whole row.", smallest_group=SMALLEST_GROUP),
            )


class Method(ABC):
    """One quantization method: the object `METHOD` of the module in `methods` that is named after it.

    A method that stores its layers in GPTQ's format subclasses `gptq_format.GptqFormat`, which leaves `quantize` to
    write. Any other format needs the four functions that describe it, and a reader in `kernels` to be loaded again.
    """

    name: str
    label: str
    """Name for people: "GPTQ"."""
    description: str
    """One line for the page: quality, requirements and time."""
    Options: Any
    """Its subclass of `Options`."""
    calibrated: bool = False
    """Whether it needs calibration text run through the model."""
    matrices: int = 0
    """fp32 matrices [in, in] in memory while it solves for layers with `in` inputs."""
    config_file: bool = True
    """Whether `quantize_config.json` repeats `config`, as AutoGPTQ and AutoAWQ write it."""

    def available(self, hardware: Hardware) -> str | None:  # noqa: ARG002  most methods run anywhere
        """Why it cannot run on this machine, in a sentence; None if it can."""
        return None

    @property
    def presets(self) -> tuple[str, ...]:
        """Variants (METHOD:BITS:GROUP) offered for comparison."""
        options = self.Options()
        return (f"{self.name}:{options.bits}:{options.group_size}",)

    @abstractmethod
    def quantize(
        self, weights: Sequence[Tensor], hessian: Hessian | None, options: Any, cancel: CancelToken
    ) -> list[Any]:
        """Quantize the weights [out, in] (any float dtype) of layers that share an input.

        Args:
            hessian: statistics of that input, which may be overwritten; None for methods without calibration.
            options: an instance of `self.Options`, checked.

        Returns:
            For each weight a `kernels.quantized.Quantized` (calibrated methods: always) or a `kernels.quantized.Packed`.

        Raises:
            Cancelled: within a second of Stop.
        """

    def products(self, options: Any) -> float:  # noqa: ARG002
        """How often a calibrated method multiplies a layer's weights by the Hessian, for estimates of time."""
        return 0.0

    def layer_tensors(self, weight: Any, options: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """The tensors stored for a quantized layer, by the last part of their names; a `Packed` has them ready."""
        tensors: dict[str, Tensor] = weight.tensors
        return tensors

    @abstractmethod
    def layer_bytes(self, rows: int, columns: int, options: Any) -> int:
        """Stored bytes of a layer with `rows` outputs and `columns` inputs."""

    def packing_bytes(self, options: Any) -> int:  # noqa: ARG002
        """Bytes per weight in memory while a layer is quantized without calibration, beside its original.

        By default the codes as uint8, a copy of them in packing order, and the packed words.
        """
        return 3

    @abstractmethod
    def config(self, options: Any) -> dict[str, Any]:
        """`quantization_config` of config.json, as transformers and vLLM read it."""

    def skipping(self, layers: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
        """What `config` says of linear layers of the blocks that stay as they are; names are relative to the block."""
        return {}

    def serving(self, options: Any) -> str:  # noqa: ARG002
        """How to serve the folder with vLLM, a paragraph of the model card; "" where nothing is known."""
        return ""

    def meta(self, options: Any) -> dict[str, Any]:
        """Who made a checkpoint and with which options, for `config`."""
        return {"quantizer": [f"lowmem:{__version__}"], "method": self.name, "options": asdict(options)}
