"""Linear layers of up to 4 bits on the CPU, by ONNX Runtime's MatMulNBits: 0.57 bytes a weight in groups of 64.

The kernel reads the codes and computes in fp32 (accuracy level 1), so its results are those of the dense weights: one row by
a kernel of its own, many rows through dequantized tiles. It picks its instructions (AVX-512, AVX2, NEON) itself.
Its int8 arithmetic (accuracy level 4) decodes large layers twice as fast, but rounds activations: on the demo model the top-1
token then matches that of the dense weights in 96 % of positions instead of 98 %, while a decoding step gets 8 % faster.

Every layer is a session of its own without threads: torch's and ONNX Runtime's thread pools would wait for each other on few
cores, and a pool per layer would mean hundreds of threads. Long prompts are split by rows, large layers by outputs, among plain
threads; sessions release the GIL.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.background import in_background, keep_idle
from lowmem.errors import MissingDependency
from lowmem.kernels.layouts import NBITS, block_size
from lowmem.kernels.onnx_model import one_node
from lowmem.kernels.quantized import Quantized
from lowmem.messages import msg

SPLIT_WEIGHTS = 8_000_000
"""Layers of more weights than this are worth a session per core."""

MOST_PARTS = 4
"""Most sessions that split the outputs of a large layer; beyond that memory bandwidth bounds decoding."""

THREADED_WORK = 64_000_000
"""Multiplications worth a second thread: about 0.2 ms of them."""


class NBitsLinear(nn.Module):
    """`y = x W^T + b`; x and y are float32 [..., in] and [..., out] on the CPU.

    Args:
        weight: codes of at most 4 bits, held in 4.
        group_size: inputs of a group, one that `block_size` accepts.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """

    order: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Quantized, group_size: int, bias: Tensor | None) -> None:
        super().__init__()
        weight, order = weight.in_group_order()
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.register_buffer("weight", torch.empty(0), persistent=False)  # some families ask it for its dtype
        block = block_size(group_size)
        weights = dict(
            zip(("B", "scales", "zero_points"), (part.numpy() for part in weight.blocks(block)), strict=True)
        )
        attributes = {"K": self.in_features, "bits": NBITS, "block_size": block, "accuracy_level": 1}
        self._parts = [
            (columns, _session(attributes, {name: array[columns] for name, array in weights.items()}))
            for columns in _columns(self.out_features, self.in_features)
        ]
        keep_idle(torch.get_num_threads() - 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        y = torch.from_numpy(self._multiply(x.contiguous().numpy()))
        return y if self.bias is None else y.add_(self.bias)

    def _multiply(self, x: np.ndarray) -> np.ndarray:
        rows = x.size // self.in_features
        threads = torch.get_num_threads() // len(self._parts)
        shares = max(1, min(threads, rows, x.size * self.out_features // THREADED_WORK))
        if shares * len(self._parts) == 1:
            return _run(self._parts[0][1], x)
        x, shape = x.reshape(rows, self.in_features), (*x.shape[:-1], self.out_features)
        y = np.empty((rows, self.out_features), dtype=np.float32)
        bounds = itertools.pairwise(rows * share // shares for share in range(shares + 1))
        spans = [slice(start, stop) for start, stop in bounds]

        def share(job: tuple[tuple[slice, Any], slice]) -> None:
            (columns, session), span = job
            y[span, columns] = _run(session, x[span])

        first, *others = itertools.product(self._parts, spans)
        running = [in_background(share, job) for job in others]
        share(first)
        for future in running:
            future.result()
        return y.reshape(shape)


def _run(session: Any, x: np.ndarray) -> np.ndarray:
    return session.run(("y",), {"x": x})[0]


def _columns(outputs: int, inputs: int) -> list[slice]:
    """The outputs of each part, multiples of 16 except for the last."""
    parts = min(torch.get_num_threads(), MOST_PARTS) if outputs * inputs > SPLIT_WEIGHTS else 1
    step = -(-outputs // parts // 16) * 16
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def _session(attributes: dict[str, int], weights: dict[str, np.ndarray]) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency(
            msg("onnxruntime, which runs quantized layers on CPUs, is not installed."), "pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # One node leaves nothing to optimize or to cache between calls; both would cost memory in every layer.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    model = one_node("MatMulNBits", "com.microsoft", attributes | {"N": len(weights["B"])}, weights)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session._model_bytes = None  # kept for changing providers: a second copy of every weight
    return session
