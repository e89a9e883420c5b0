"""Measures how fast this machine quantizes, with the functions that quantize. Import this late, since it needs torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lowmem.events import CancelToken, drain, until_receipt
from lowmem.machine.budget import UNLIMITED
from lowmem.machine.rates import rate
from lowmem.models.blocks import Block, Branch, Stage
from lowmem.models.synthetic import write_random_model
from lowmem.quant.activations import Activations
from lowmem.quant.base import Method
from lowmem.quant.block_run import BlockRun
from lowmem.quant.hessian import Hessian
from lowmem.quant.pipeline import quantize_folder
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.scaling import channel_scales
from lowmem.quant.skeleton import Call
from lowmem.settings import settings

PLAIN_MODEL: dict[str, Any] = {"layers": 8, "hidden": 1024, "intermediate": 4096, "heads": 16, "vocab": 8192}
"""Its 151 million parameters are quantized to measure a method without calibration."""

LLAMA = Block(
    (
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(("self_attn.o_proj",)),
        Stage(("mlp.gate_proj", "mlp.up_proj")),
        Stage(("mlp.down_proj",)),
    ),
    (Branch("self_attn", "self_attn.o_proj", 1), Branch("mlp", "mlp.down_proj", -1)),
)
"""The block that is measured."""

TOKENS = 1024
"""For a Hessian; how many does not matter."""

SAMPLES = 2
"""Samples of the calibration text that pass through a block."""

PRODUCT = 2048
RANK = 128
"""Shape of a matrix product: a [PRODUCT, PRODUCT] matrix is corrected for RANK columns at a time, as solvers do."""


def plain_rate(request: QuantizeRequest) -> float:
    """Parameters per second of a method without calibration: of a whole quantization, from file to file."""
    with _scratch() as scratch:
        model = scratch / "model"
        spec = write_random_model(model, **PLAIN_MODEL)
        trial = replace(request, model=str(model), out=scratch / "quantized", budget=UNLIMITED)
        receipt = drain(until_receipt(quantize_folder(model, trial)))
        return spec.parameters / receipt.seconds


def strip_rate(method: Method, options: Any, rows: Sequence[int], width: int, device: str) -> float:
    """Columns per second of solving for layers with `rows` outputs that share `width` inputs."""
    weights = [_random(count, width, device=device) for count in rows]
    statistics = _hessian(width, device)
    matrix, magnitude = statistics.matrix.clone(), statistics.magnitude.clone()

    def solve() -> None:
        statistics.matrix, statistics.magnitude = matrix.clone(), magnitude.clone()
        if options.scale_channels:
            channel_scales(weights, statistics, options, CancelToken())
        for weight in method.quantize(weights, statistics, options, CancelToken()):
            method.layer_tensors(weight, options)

    return rate(solve, width)


def factor_rate(columns: int, device: str) -> float:
    """Columns cubed per second of factorizing a Hessian, as GPTQ does."""
    from lowmem.quant.methods.gptq_solver import inverse_factor

    matrix = _hessian(columns, device).matrix
    matrix.diagonal().add_(1.0)  # of full rank
    return rate(lambda: inverse_factor(matrix), columns**3)


def product_rate(device: str) -> float:
    """Floating-point operations per second of the products that solvers spend their time on."""
    target, left, right = (
        _random(*shape, device=device) for shape in ((PRODUCT, PRODUCT), (PRODUCT, RANK), (RANK, PRODUCT))
    )
    return rate(lambda: target.addmm_(left, right, alpha=-1).sum().item(), 2 * target.numel() * RANK)


def calibration_rate(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, tokens: int, device: str
) -> float:
    """Weights per second of passing samples of `tokens` tokens through a Llama block of this shape, stage by stage."""
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, head_dim=head_dim, vocab_size=64, **shape,
        max_position_embeddings=tokens,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(device).eval()
    weights = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
    states, places = _random(1, tokens, hidden, device=device), torch.arange(tokens, device=device)[None]
    call = Call((), {"position_embeddings": LlamaRotaryEmbedding(config).to(device)(states, places)})
    with _scratch() as scratch:
        inputs, outputs = (Activations(scratch / name, SAMPLES, tokens, hidden) for name in ("inputs", "outputs"))
        for index in range(SAMPLES):
            inputs.write(index, states)

        def pass_through() -> None:
            run = BlockRun(block, call, LLAMA, inputs, scratch, CancelToken())
            for stage in LLAMA.stages:
                for _ in run.accumulate(stage, run.hessian(stage)):
                    pass
            for _ in run.finish(outputs):
                pass
            run.close()

        found = rate(pass_through, SAMPLES * weights)
        inputs.close()
        outputs.close()
    return found


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on the disk that results are written to."""
    home = settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        yield Path(folder)


def _hessian(columns: int, device: str) -> Hessian:
    made = Hessian(columns, torch.device(device))
    made.add(_random(TOKENS, columns, device=device))
    made.finish()
    return made


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
