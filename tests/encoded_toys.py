"""Toys whose linear layers are stored as codes and scales in the formats of the hub; and what they stand for.

Each format is written here from its description, independently of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_toys
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

FP8_MAX = 448.0
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Parts = dict[str, Tensor]
"""The tensors of a weight by what follows its name, "" for the codes themselves."""

Encode = Callable[[Tensor], tuple[Parts, Tensor]]
"""The parts of a weight [out, in], and the weight that they stand for."""


def fp8_blocks(weight: Tensor, rows: int = 128, columns: int = 128, name: str = "_scale_inv") -> tuple[Parts, Tensor]:
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (tiles.abs().amax((1, 3)) / FP8_MAX).clamp_min(1e-8)
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    whole = codes.flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]].contiguous()
    return {"": whole, name: scales}, dense[: weight.shape[0], : weight.shape[1]]


def fp8_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / FP8_MAX).bfloat16()
    codes = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scales}, codes.float() * scales.float()


def fp8_tensor(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax() / FP8_MAX
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale


def grid(weight: Tensor, bits: int, group: int, symmetric: bool, order: Tensor | None = None) -> tuple[Tensor, ...]:
    """Signed codes, scales and zero points [out, groups], and the weight that they stand for."""
    groups = torch.arange(weight.shape[1]) // group if order is None else order
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales, zeros = [], []
    for one in range(int(groups.max()) + 1):
        part = weight[:, groups == one]
        if symmetric:
            scales.append(part.abs().amax(1) / high)
            zeros.append(torch.zeros(len(weight)))
        else:
            least, most = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scales.append((most - least) / (high - low))
            zeros.append((low - least / scales[-1]).round().clamp(low, high))
    scale, zero = torch.stack(scales, 1).half().float(), torch.stack(zeros, 1)
    codes = (weight / scale[:, groups] + zero[:, groups]).round().clamp(low, high)
    return codes, scale, zero, (codes - zero[:, groups]) * scale[:, groups]


def words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Signed codes as compressed-tensors packs them: shifted to unsigned, 32 // bits in a word, the first lowest."""
    unsigned = (codes.to(torch.int64) + 2 ** (bits - 1)).movedim(dim, -1)
    lanes = 32 // bits
    unsigned = nn.functional.pad(unsigned, (0, -unsigned.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
    packed = (unsigned << torch.arange(0, lanes * bits, bits)).sum(-1)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def packed(bits: int, group: int, symmetric: bool = True, act_order: bool = False) -> Encode:
    def encode(weight: Tensor) -> tuple[Parts, Tensor]:
        outputs, inputs = weight.shape
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) // group if act_order else None
        codes, scale, zero, dense = grid(weight, bits, inputs if group < 0 else group, symmetric, order)
        parts = {
            "_packed": words(codes, bits, 1),
            "_scale": scale.half(),
            "_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            parts["_zero_point"] = words(zero, bits, 0)
        if order is not None:
            parts["_g_idx"] = order.int()
        return parts, dense

    return encode


def int8(group: int, symmetric: bool) -> Encode:
    def encode(weight: Tensor) -> tuple[Parts, Tensor]:
        codes, scale, zero, dense = grid(weight, 8, weight.shape[1] if group < 0 else group, symmetric)
        parts = {"": codes.to(torch.int8), "_scale": scale}
        return parts if symmetric else parts | {"_zero_point": zero.to(torch.int8)}, dense

    return encode


def nearest_fp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits and their values."""
    index = (values.abs()[..., None] - FP4).abs().argmin(-1)
    return (index + 8 * (values < 0)).to(torch.uint8), FP4[index] * values.sign()


def mxfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    """Codes [.., rows, groups, 16] and exponents [.., rows, groups]."""
    tiles = weight.unflatten(-1, (-1, 32))
    exponents = (tiles.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    codes, values = nearest_fp4(tiles / exponents.exp2()[..., None])
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"_blocks": blocks, "_scales": (exponents + 127).to(torch.uint8)}, (
        values * exponents.exp2()[..., None]
    ).flatten(-2)


def nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    tiles = weight.unflatten(-1, (-1, 16))
    whole = FP8_MAX * 6 / weight.abs().amax()
    scales = (tiles.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    factors = scales.float() / whole
    codes, values = nearest_fp4(tiles / factors[..., None].clamp_min(1e-12))
    flat = codes.flatten(-2)
    parts = {"_packed": flat[:, 0::2] | flat[:, 1::2] << 4, "_scale": scales, "_global_scale": whole.reshape(1)}
    return parts, (values * factors[..., None]).flatten(-2)


def save(model: PreTrainedModel, folder: Path, encode: Encode, described: dict[str, Any] | None) -> PreTrainedModel:
    """Write `model` with its linear layers encoded, and give it the dense weights that the file stands for."""
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, layer in packed_toys.linears(model).items():
        parts, dense = encode(layer.weight)
        layer.weight.copy_(dense)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.weight{ending}": part.contiguous() for ending, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    packed_toys.edit_config(folder, described)
    return model


def load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
