"""What a quantization would make and cost, and whether it fits, before anything is read. No torch.

Time is work over speed. Work is counted from the shapes: floating-point operations of a calibrated method, weights of
the others. Speed is what the last run of the method had on this machine; before the first it is what two cores of an
AMD EPYC had, and the sentence says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import Unsupported
from lowmem.machine.figures import figures, keep
from lowmem.machine.hardware import Hardware
from lowmem.models.blocks import FAMILIES
from lowmem.models.spec import ModelSpec
from lowmem.planning.model_bytes import is_linear, linear_shape
from lowmem.quant.base import Options, Quantizer
from lowmem.quant.calibration import Calibration
from lowmem.quant.estimate import Estimate, check_shapes, estimate
from lowmem.units import format_bytes

RATES = "quantize-rates.json"
ELSEWHERE = {
    "int8_dynamic": 1.3e7,
    "bnb": 8.4e6,
    "rtn": 1.2e7,
    "hqq": 9.2e6,
    "gptq": 8.1e10,
    "awq": 7.7e10,
}
"""Work a second of every method on two cores of an AMD EPYC: weights, or operations where it is calibrated."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted before the start.

    Args:
        estimate: bytes of the result, of memory and disk.
        original_bytes: weight files of the original.
        seconds: time, and `timing`, where the figure comes from.
        limit: bytes that the process may hold.
    """

    estimate: Estimate
    original_bytes: int
    seconds: float
    timing: str
    limit: int

    @property
    def verdict(self) -> str:
        """ "fits", "tight" (above 90 % of the limit) or "over"."""
        if self.estimate.ram_bytes > self.limit:
            return "over"
        return "tight" if self.estimate.ram_bytes > 0.9 * self.limit else "fits"

    def sentence(self) -> str:
        peak, limit = self.estimate.ram_bytes, self.limit
        if peak > limit:
            over = format_bytes(peak - limit)
            return f"Needs {format_bytes(peak)} of RAM, {over} more than the {format_bytes(limit)} that are left."
        return f"{self.verdict.capitalize()}: {format_bytes(peak)} of the {format_bytes(limit)} RAM that are left."


def forecast(
    spec: ModelSpec, method: Quantizer, options: Options, calibration: Calibration, hardware: Hardware, limit: int
) -> Forecast:
    """The cost of quantizing `spec`.

    Raises:
        Unsupported, BadInput: it cannot be quantized, or not so.
    """
    if spec.quantization:
        raise Unsupported(f"{spec.name} is already quantized with {spec.quantization}.", "Choose the original model.")
    if spec.model_type not in FAMILIES:
        raise Unsupported(
            f"Models of type {spec.model_type!r} cannot be taken apart block by block yet.",
            f"These can: {', '.join(FAMILIES)}.",
        )
    check_shapes(spec, options.group_size)
    cost = estimate(spec, method, options, calibration, hardware.runtime_bytes)
    here = figures(RATES).get(method.name, 0.0)
    timing = "as fast as this method's last one here" if here > 0 else "on two cores of an AMD EPYC"
    seconds = work(spec, method, options, calibration) / (here if here > 0 else ELSEWHERE[method.name])
    return Forecast(cost, spec.size_on_disk, seconds, timing, limit)


def work(spec: ModelSpec, method: Quantizer, options: Options, calibration: Calibration) -> float:
    """What time is taken to be in proportion to, see above."""
    shapes = [linear_shape(spec, tensor) for tensor in spec.tensors if is_linear(tensor)]
    weights = float(sum(rows * columns for rows, columns in shapes))
    if not method.calibrated:
        return weights
    # Forward passes: one to reach each of four stages in part, one for the outputs; q, k, v and gate, up share moments.
    passes = 2.5 * 2 * weights * calibration.tokens
    moments = sum(2.0 * columns**2 * calibration.tokens for _, columns in shapes) * 4 / 7
    rounds = 1 + getattr(options, "sweeps", 0)
    return passes + moments + rounds * sum(2.0 * rows * columns**2 for rows, columns in shapes)


def remember(spec: ModelSpec, method: Quantizer, options: Options, calibration: Calibration, seconds: float) -> None:
    """Note how fast a run was, for the next forecast."""
    if seconds > 0:
        keep(RATES, figures(RATES) | {method.name: work(spec, method, options, calibration) / seconds})
