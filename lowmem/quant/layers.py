"""Which tensors of a model are quantized. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.errors import BadInput, Unsupported
from lowmem.messages import msg
from lowmem.models.blocks import NOT_APART
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.quant.base import Options
from lowmem.quant.request import QuantizeRequest

PACKED = 32
"""Inputs and outputs of a packed layer come in multiples of this, so that words are full at every bit width."""

TABLE_COLUMNS = 4
"""Columns of a packed table come in multiples of this, so that bytes are full at every bit width."""

MOST_WIDE = 0.1
"""Most of the weights that may stay as they are because groups do not divide their inputs."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """Equal matrices that a tensor is quantized as: one, or those of every expert, as the file stores them."""

    tensor: Tensor
    count: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def packable(self) -> bool:
        return not (self.rows % PACKED or self.columns % PACKED)

    def divided_by(self, group_size: int) -> bool:
        return group_size == -1 or not self.columns % group_size


def quantized_matrices(spec: ModelSpec, options: Options) -> list[Matrices]:
    """What quantizing with `options` makes codes of; other weights of the blocks stay as they are."""
    return [matrices for matrices in _candidates(spec) if matrices.divided_by(options.group_size)]


def wide_layers(spec: ModelSpec, options: Options) -> list[str]:
    """Names, relative to their block, of linear layers that stay as they are: routers, and those that fit no packed words."""
    quantized = {matrices.tensor.name for matrices in quantized_matrices(spec, options)}
    prefix = f"{spec.blocks.path}."
    rest = (t.name for t in spec.tensors if t.role == "linear" and t.name not in quantized)
    inner = (name.removeprefix(prefix).partition(".")[2].removesuffix(".weight") for name in rest)
    return sorted(set(inner))


def _candidates(spec: ModelSpec) -> list[Matrices]:
    """The linear layers and experts of all blocks that fit packed words; routers choose experts and stay exact."""
    return [m for m in _matrices(spec) if m.packable and not (m.tensor.role == "linear" and m.rows == spec.experts)]


def _matrices(spec: ModelSpec) -> Iterator[Matrices]:
    for tensor in spec.tensors:
        if tensor.role in ("linear", "experts"):
            count, rows, columns = tensor.matrices
            yield Matrices(tensor, count * tensor.parts, rows // tensor.parts, columns)


def packed_tables(spec: ModelSpec, bits: int) -> list[Tensor]:
    """The embeddings and the output head that are stored as packed tables of `bits` bits; none for 16.

    Positions, which are few rows, stay as they are, and so does what the family's code computes in fp32.
    """
    if bits == 16:
        return []
    return [
        tensor
        for tensor in spec.tensors
        if tensor.role in ("embedding", "head")
        and 2 * tensor.shape[0] >= spec.vocab
        and not (tensor.wide or tensor.transposed or tensor.shape[1] % TABLE_COLUMNS)
    ]


def check_model(spec: ModelSpec, request: QuantizeRequest) -> None:
    """Check that `spec` can be quantized as `request` says.

    Raises:
        Unsupported: it is quantized already, has no blocks or none that can be calibrated, or its layers cannot be packed.
        BadInput: the groups do not divide its layers; the hint names sizes that do.
    """
    if spec.quantization:
        raise Unsupported(
            msg("{model} is already quantized with {quantization}.", model=spec.name, quantization=spec.quantization),
            msg("Choose the original model."),
        )
    if spec.encoder or not spec.blocks.path:
        raise Unsupported(
            msg("{model} ({model_type}) has no list of decoder blocks.", model=spec.name, model_type=spec.model_type),
            msg("Choose a text generation model."),
        )
    method, options = request.method, request.options
    if method.calibrated and spec.blocks.not_apart:
        raise Unsupported(
            msg(
                "{method} runs one block at a time, which {model_type} models do not allow: {reason}.",
                method=method.label,
                model_type=spec.model_type,
                reason=NOT_APART[spec.blocks.not_apart],
            ),
            msg("Choose a method without calibration, such as HQQ."),
        )
    candidates = _candidates(spec)
    if not candidates:
        raise Unsupported(
            msg(
                "No layer of {model} has inputs and outputs in multiples of {packed}, which packed layers need.",
                model=spec.name,
                packed=PACKED,
            ),
            msg("Choose another model."),
        )
    _check_groups(candidates, options.group_size)


def _check_groups(candidates: list[Matrices], group_size: int) -> None:
    odd = [matrices for matrices in candidates if not matrices.divided_by(group_size)]
    if sum(matrices.elements for matrices in odd) <= MOST_WIDE * sum(matrices.elements for matrices in candidates):
        return
    largest = max(odd, key=lambda matrices: matrices.elements)
    fitting = ", ".join(str(size) for size in (32, 64, 128, 256) if largest.divided_by(size))
    raise BadInput(
        msg(
            "Groups of {group_size} do not divide the {columns:,} inputs of {tensor}.",
            group_size=group_size,
            columns=largest.columns,
            tensor=largest.tensor.name,
        ),
        msg("Use {fitting} or -1.", fitting=fitting) if fitting else msg("Use -1, one group per row."),
    )
