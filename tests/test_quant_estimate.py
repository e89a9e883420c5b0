"""The memory that quantizing without calibration is estimated to take, tensor by tensor."""

import pytest

from lowmem.models.spec import Tensor
from lowmem.quant import get
from lowmem.quant.estimate import _copying_bytes, _rounding_bytes
from lowmem.quant.layers import Matrices
from lowmem.quant.request import QuantizeRequest

MB = 1_000_000


@pytest.mark.parametrize(("dtype", "size", "converted"), [("fp16", 2, 0), ("bf16", 2, 0), ("fp32", 4, 50 * MB)])
def test_of_a_tensor_that_is_converted_one_of_equal_chunks_is_held_twice(dtype: str, size: int, converted: int) -> None:
    embedding = Tensor("model.embed_tokens.weight", dtype, (50_000, 1000), size * 50 * MB)
    assert _copying_bytes(embedding) == 100 * MB + converted


def test_two_layers_are_at_work_beside_the_results_of_larger_ones() -> None:
    shapes = {"up_proj": (4000, 1000), "down_proj": (1000, 4000), "q_proj": (1000, 1000)}
    linears = [
        Matrices(Tensor(f"model.layers.{block}.{name}.weight", "fp16", shape, 2 * shape[0] * shape[1]), 1, *shape)
        for block in range(2)
        for name, shape in shapes.items()
    ]
    method = get("rtn")
    request = QuantizeRequest("any", method, method.Options())
    # Each of the two largest: the fp16 original, a byte per code, and the rows being rounded.
    assert _rounding_bytes(request, linears) == 2 * (3 * 4 * MB + 16 * MB)
