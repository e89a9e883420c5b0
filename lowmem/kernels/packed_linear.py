"""Linear layers of GPTQ and AWQ checkpoints, run from their codes.

`read` checks and unpacks the stored tensors; `packed_linear` chooses the kernel: on CPUs MatMulNBits (`nbits_linear`), or int8
(`int8_fine`) for codes it has no fast kernel for; on GPUs gptqmodel's kernels if installed (`gptqmodel_kernel`), else
`PackedLinear`, which runs anywhere and dequantizes one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowmem.errors import CorruptModel
from lowmem.kernels import bnb_linear, gptqmodel_kernel
from lowmem.kernels.int8_fine import FineInt8Linear
from lowmem.kernels.int8_linear import Int8Linear, largest_code
from lowmem.kernels.layouts import code_width, cpu_kernel, has_int8_kernels
from lowmem.kernels.nbits_linear import NBitsLinear
from lowmem.kernels.packing import from_awq, from_gptq
from lowmem.kernels.quantized import Quantized, consecutive, dequantize_, pack_bytes, unpack_lanes
from lowmem.messages import msg
from lowmem.models.quantization import BNB, INT8, Quantization

INT8_ZERO = 128
"""Added to int8 codes to make them unsigned."""

Parts = dict[str, Tensor]
"""The tensors of one layer: "qweight", "qzeros", "scales", perhaps "g_idx" and "bias"."""


def stored_linear(
    stored: Quantization, name: str, parts: Parts, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The fastest layer that computes with the tensors of a quantized layer, whatever its method.

    Args:
        name: of the layer, for errors.
        parts: its tensors, whose shapes have been checked by `check_shapes`.
        shape: (outputs, inputs).

    Raises:
        CorruptModel: the tensors hold impossible values.
    """
    if stored.method != BNB:
        return packed_linear(stored, name, parts, device, dtype)
    if stored.bits == 8:
        return bnb_linear.stored8(parts, device, dtype)
    return bnb_linear.stored4(name, parts, *shape, device, dtype)


def packed_linear(stored: Quantization, name: str, parts: Parts, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The layer for the tensors of a GPTQ, AWQ or compressed-tensors layer; their shapes have been checked.

    Raises:
        CorruptModel: the tensors hold impossible values; the message names the layer.
    """
    if stored.method == INT8:
        return _int8_linear(name, parts, device, dtype)
    weight, bias = read(stored, name, parts), parts.get("bias")
    kernel = cpu_kernel(stored) if device.type == "cpu" else ""
    if kernel == "nbits":
        return NBitsLinear(weight, stored.group_size, bias)
    if kernel == "int8":
        return FineInt8Linear.from_quantized(weight, bias)
    layer = PackedLinear(weight, stored.group_size, bias, device, dtype)
    return (gptqmodel_kernel.like(layer, weight, stored, parts, dtype) if device.type == "cuda" else None) or layer


def _int8_linear(name: str, parts: Parts, device: torch.device, dtype: torch.dtype) -> nn.Module:
    codes, scales, bias = parts["weight"], parts["weight_scale"].float(), parts.get("bias")
    if not torch.isfinite(scales).all():
        raise CorruptModel(
            msg("{name}.weight_scale contains NaN or infinite values.", name=name), msg("Fetch the model again.")
        )
    weight = Quantized(
        codes=(codes.to(torch.int16) + INT8_ZERO).to(torch.uint8),
        scales=scales,
        zeros=torch.full_like(scales, INT8_ZERO, dtype=torch.uint8),
        groups=consecutive(codes.shape[1], -1),
        bits=8,
    )
    if device.type != "cpu" or not has_int8_kernels():
        return PackedLinear(weight, -1, bias, device, dtype)
    if int(codes.max()) > largest_code() or int(codes.min()) < -largest_code():
        return Int8Linear.from_weight(weight.dequantize(), bias)  # quantized for processors with wider accumulators
    return Int8Linear(codes, scales.squeeze(1), bias)


def check_shapes(
    stored: Quantization, name: str, outputs: int, inputs: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the shapes of the tensors of a packed layer.

    Raises:
        CorruptModel: a part is missing or has another shape, naming both.
    """
    groups = stored.groups(inputs)
    expected: dict[str, tuple[int, ...]] = {
        "qweight": stored.qweight_shape(outputs, inputs),
        "qzeros": (groups, -(-outputs * stored.bits // 32)),
        "scales": (groups, outputs),
    }
    if stored.method in (INT8, BNB):
        expected = {"weight": expected["qweight"]}
        if stored.bits == 8:
            expected |= {"weight_scale": (outputs, 1)} if stored.method == INT8 else {"SCB": (outputs,)}
    optional = {part: size for part, size in (("g_idx", (inputs,)), ("bias", (outputs,))) if part in shapes}
    for part, shape in (expected | optional).items():
        if part not in shapes:
            raise CorruptModel(
                msg("{name} has no {part} in the files.", name=name, part=part), msg("Fetch the model again.")
            )
        if shapes[part] != shape:
            raise CorruptModel(
                msg(
                    "{name}.{part} is {shapes} in the file, but with {label} it would be {shape}.",
                    name=name,
                    part=part,
                    shapes=shapes[part],
                    label=stored.label,
                    shape=shape,
                ),
                msg("Fetch the model again."),
            )


def read(stored: Quantization, name: str, parts: Parts) -> Quantized:
    """The codes of a layer.

    Raises:
        CorruptModel: scales are not finite, or groups do not have equal numbers of inputs.
    """
    if not torch.isfinite(parts["scales"]).all():
        raise CorruptModel(
            msg("{name}.scales contains NaN or infinite values.", name=name), msg("Fetch the model again.")
        )
    if stored.method == "awq":
        return from_awq(parts)
    in_sequence = consecutive(_inputs(stored, parts), stored.group_size)
    # Old checkpoints without act-order may lack the order; one group a row needs none.
    g_idx = parts.get("g_idx") if stored.group_size > 0 else None
    g_idx = in_sequence if g_idx is None else g_idx
    if not torch.equal(g_idx.sort().values, in_sequence):
        raise CorruptModel(
            msg(
                "{name}.g_idx does not assign its {g_idx:,} inputs to groups of {group_size}.",
                name=name,
                g_idx=len(g_idx),
                group_size=stored.group_size,
            ),
            msg("Fetch the model again."),
        )
    return from_gptq(parts | {"g_idx": g_idx}, stored.bits, v2=stored.layout == "gptq_v2")


def _inputs(stored: Quantization, parts: Parts) -> int:
    rows, columns = parts["qweight"].shape
    return len(parts["g_idx"]) if "g_idx" in parts else stored.linear_shape((rows, columns))[1]


class PackedLinear(nn.Module):
    """`y = x W^T + b`; x and y are [..., in] and [..., out] in `dtype`.

    Codes are bytes [in / codes per byte, out], lowest bits first; inputs of act-order layers are sorted by group. Dequantized
    weights exist only while the layer computes.
    """

    order: Tensor | None
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Quantized, group_size: int, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self._group_size = group_size if group_size > 0 else self.in_features
        self._bits, self._dtype = code_width(weight.bits), dtype
        weight, order = weight.in_group_order()
        held = {
            "order": order,
            "codes": pack_bytes(weight.codes.t(), self._bits, dim=0),
            "zeros": weight.zeros.t().contiguous(),
            "scales": weight.scales.t().contiguous(),
            "bias": None if bias is None else bias.to(dtype),
            "weight": torch.empty(0, dtype=dtype),  # some families ask it for its device and dtype
        }
        for name, tensor in held.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        y = x @ self.dense()
        return y if self.bias is None else y.add_(self.bias)

    def dense(self) -> Tensor:
        """The dequantized weights [in, out], inputs in the order of their groups."""
        lanes = 8 // self._bits
        weight = torch.empty(len(self.codes), lanes, self.out_features, dtype=self._dtype, device=self.codes.device)
        unpack_lanes(self.codes, self._bits, [weight[:, lane] for lane in range(lanes)])
        weight = weight.view(-1, self.out_features)[: self.in_features]
        return dequantize_(weight, self.scales, self.zeros, self._group_size)
