"""How a checkpoint is quantized: method, bits, groups and layout, and the shapes of its packed tensors.

Read from `quantization_config` in config.json, or from the separate files of older tools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.messages import msg
from lowmem.models.files import Files, read_object
from lowmem.models.foreign import pattern

SIDE_FILES = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ described their checkpoints before config.json did."""

INT8, BNB = "compressed-tensors", "bitsandbytes"

LAYOUTS = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    INT8: ("int-quantized",),
    BNB: ("nf4", "fp4", "int8"),
}
"""Supported layouts by method; "gptq" (v1) stores zero points minus one."""

WIDTHS = {"gptq": (2, 3, 4, 8), "awq": (4,), INT8: (8,), BNB: (4, 8)}

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rule:
    """Bits and group size of the layers whose names match `pattern`; None for those of the whole checkpoint."""

    pattern: str
    bits: int | None
    group_size: int | None

    def matches(self, layer: str) -> bool:
        return pattern(self.pattern).matches(layer)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint stores its linear layers.

    Args:
        method: "gptq", "awq", `INT8`, `BNB`, or whatever else config.json names.
        bits: width of a code.
        group_size: inputs that share a scale and a zero point; -1 for a whole row.
        layout: one of `LAYOUTS`, or the unknown name.
        desc_act: act-order; inputs of a group are scattered, as listed in `g_idx`.
        rules: layers with bits or groups of their own; the first that matches counts.
    """

    method: str
    bits: int = 0
    group_size: int = -1
    layout: str = ""
    desc_act: bool = False
    rules: tuple[Rule, ...] = ()

    def of(self, layer: str) -> Quantization:
        """How the layer of this stored name is laid out."""
        rule = next((rule for rule in self.rules if rule.matches(layer)), None)
        if rule is None:
            return self
        bits = self.bits if rule.bits is None else rule.bits
        return self.at((bits, self.group_size if rule.group_size is None else rule.group_size))

    def at(self, packing: tuple[int, int] | None) -> Quantization:
        """With other bits and groups, see `Tensor.packing`."""
        return self if packing is None else replace(self, bits=packing[0], group_size=packing[1])

    @property
    def label(self) -> str:
        if self.method == INT8:
            return msg("int8, one scale per row")
        if self.method == BNB:
            return f"bitsandbytes, {'LLM.int8' if self.bits == 8 else self.layout.upper()}"
        groups = (
            msg("one group per row")
            if self.group_size < 0
            else msg("groups of {group_size}", group_size=self.group_size)
        )
        label = msg("{method}, {bits} bits, {groups}", method=self.method.upper(), bits=self.bits, groups=groups)
        return msg("{label}, some layers otherwise", label=label) if self.rules else label

    def groups(self, inputs: int) -> int:
        """Groups in a row of `inputs` weights."""
        return 1 if self.group_size < 0 else -(-inputs // self.group_size)

    def refusal(self) -> str:
        """Why such a checkpoint cannot run, or ""."""
        if self.method not in LAYOUTS:
            return msg("It is quantized with {method}, which lowmem cannot read.", method=self.method)
        if self.layout not in LAYOUTS[self.method]:
            return msg(
                "It is quantized with {method} in the layout {layout!r}, which lowmem cannot read.",
                method=self.method,
                layout=self.layout,
            )
        for bits in (self.bits, *(rule.bits for rule in self.rules if rule.bits is not None)):
            if bits not in WIDTHS[self.method]:
                widths = ", ".join(map(str, WIDTHS[self.method]))
                return msg(
                    "It is quantized with {method} to {bits} bits; lowmem supports {widths}.",
                    method=self.method,
                    bits=bits,
                    widths=widths,
                )
        for size in (self.group_size, *(rule.group_size for rule in self.rules if rule.group_size is not None)):
            if size == 0 or size < -1:
                return msg(
                    "It is quantized with {method} in groups of {group_size}, which is not a valid size.",
                    method=self.method,
                    group_size=size,
                )
        return ""

    def qweight_shape(self, outputs: int, inputs: int) -> Shape:
        if self.method == "awq":
            return inputs, outputs * self.bits // 32
        if self.method in (INT8, BNB):
            return (outputs, inputs) if self.bits == 8 else (outputs * inputs // 2, 1)
        return -(-inputs * self.bits // 32), outputs

    def linear_shape(self, qweight: Shape) -> Shape:
        """(outputs, inputs) of the layer whose `qweight` has this shape.

        bitsandbytes stores 4-bit weights as one column of bytes, which counts as one column of weights here.
        """
        rows, columns = qweight
        if self.method in (INT8, BNB):
            return (rows, columns) if self.bits == 8 else (2 * rows * columns, 1)
        return (columns * 32 // self.bits, rows) if self.method == "awq" else (columns, rows * 32 // self.bits)


def description(files: Files, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config.json, or what a separate file of older tools says; None if there is neither."""
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and isinstance(found := part.get(key), Mapping):
                return found
    side = next((name for name in SIDE_FILES if name in files.names), None)
    if side is None:
        return None
    return {"quant_method": "awq" if side == "quant_config.json" else "gptq"} | read_object(files, side)


def parse_quantization(described: Mapping[str, Any]) -> Quantization:
    """The quantization that a `quantization_config` describes."""
    method = _word(described.get("quant_method") or "unknown")
    if method == BNB:
        bits = 4 if described.get("load_in_4bit") else 8
        layout = _word(described.get("bnb_4bit_quant_type") or "fp4") if bits == 4 else "int8"
        return Quantization(method, bits, layout=layout)
    if method == INT8:
        return _compressed(described)
    if method.endswith("auto-round"):
        packing = str(described.get("packing_format") or "")
        method = "awq" if packing.endswith("awq") else "gptq" if "gptq" in packing else method
    keys = ("version", "format", "checkpoint_format") if method == "awq" else ("checkpoint_format", "format")
    default = "gemm" if method == "awq" else "gptq"
    layout = (
        "marlin"
        if described.get("is_marlin_format")
        else next((described[k] for k in keys if described.get(k)), default)
    )
    return Quantization(
        method=method,
        bits=_integer(described, ("bits", "w_bit")),
        group_size=_integer(described, ("group_size", "q_group_size"), 128),
        layout=_word(layout),
        desc_act=bool(described.get("desc_act")),
        rules=tuple(_rules(described)),
    )


def _rules(described: Mapping[str, Any]) -> Iterator[Rule]:
    """GPTQModel's `dynamic`, by regular expression, and AutoRound's `extra_config`, by name.

    What is left dense ("-:", 16 bits) needs no rule: the files tell.
    """
    for key in ("dynamic", "extra_config"):
        found = described.get(key)
        for name, changes in found.items() if isinstance(found, Mapping) else ():
            if name.startswith("-:") or not isinstance(changes, Mapping) or changes.get("bits") == 16:
                continue
            bits = _integer(changes, ("bits",)) if "bits" in changes else None
            group_size = _integer(changes, ("group_size",)) if "group_size" in changes else None
            if (bits, group_size) != (None, None):
                yield Rule(name.removeprefix("+:"), bits, group_size)


def _compressed(described: Mapping[str, Any]) -> Quantization:
    """Of compressed-tensors' many layouts int8 with a scale per row is supported; others get a name that `refusal` rejects."""
    layout = _word(described.get("format") or "unknown")
    groups = described.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = schemes[0].get("weights") if len(schemes) == 1 and isinstance(schemes[0], Mapping) else None
    if not isinstance(weights, Mapping):
        return Quantization(
            INT8, 8, layout=msg("{layout} with {schemes} kinds of layers", layout=layout, schemes=len(schemes))
        )
    if weights.get("strategy") != "channel" or not weights.get("symmetric", True):
        layout = f"{layout} by {_word(weights.get('strategy'))}"
    return Quantization(INT8, _integer(weights, ("num_bits",)), layout=layout)


def _word(value: object) -> str:
    """A name, which becomes part of a sentence where it is unknown."""
    return str(value).lower()[:80]


def _integer(described: Mapping[str, Any], keys: tuple[str, ...], default: int = 0) -> int:
    """The first of `keys` present; 0, which `refusal` rejects, if it is not an integer of some digits."""
    found = next((described[key] for key in keys if key in described), default)
    return found if type(found) is int and abs(found) < 2**31 else 0
