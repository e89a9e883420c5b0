"""The stages that are derived from a family's code: those that ten families were once listed with, and their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from families import zoo

from lowmem.events import CancelToken
from lowmem.models.blocks import Block, Stage
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.modules import empty_model
from lowmem.models.source import read_spec
from lowmem.quant.folding import with_sources
from lowmem.quant.skeleton import Entrance, Weights, below, fill

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = (
    Stage(QKV, "input_layernorm"),
    Stage(("self_attn.o_proj",)),  # values are shared by queries
    Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Stage(("mlp.down_proj",), "mlp.up_proj"),
)
SANDWICHED = (
    Stage(QKV, "input_layernorm", 1.0),
    Stage(("self_attn.o_proj",)),
    Stage(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", 1.0),
    Stage(("mlp.down_proj",), "mlp.up_proj"),
)
LISTED: dict[str, tuple[Stage, ...]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": (
        Stage(QKV, "input_layernorm", 1.0),
        Stage(("self_attn.o_proj",)),
        Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", 1.0),
        Stage(("mlp.down_proj",), "mlp.up_proj"),
    ),
    "gemma2": SANDWICHED,
    "gemma3_text": SANDWICHED,
    "phi": (
        # Attention and MLP run in parallel after one norm; GELU before fc2 prevents folding factors into fc1.
        Stage((*QKV, "mlp.fc1"), "input_layernorm"),
        Stage(("self_attn.dense",)),
        Stage(("mlp.fc2",)),
    ),
    "phi3": (
        Stage(("self_attn.qkv_proj",), "input_layernorm"),
        Stage(("self_attn.o_proj",)),
        Stage(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Stage(("mlp.down_proj",), "mlp.gate_up_proj"),
    ),
    "gpt2": (
        Stage(("attn.c_attn",), "ln_1"),
        Stage(("attn.c_proj",), "attn.c_attn"),
        Stage(("mlp.c_fc",), "ln_2"),
        Stage(("mlp.c_proj",)),
    ),
}


def sourced(folder: Path, index: int = 0) -> Block:
    """The kind of a block with the sources that folding finds."""
    spec = read_spec(str(folder))
    blocks, model = spec.blocks, empty_model(folder)
    owner = f"{blocks.path}.{index}"
    block, kind = model.get_submodule(owner), blocks[index]
    with Checkpoint(folder) as checkpoint:
        weights = Weights(model, checkpoint, spec.tensors)
        with Entrance(model, blocks, weights, [toys.prompt(40)]) as entrance:
            call, states = entrance.calls()[index], entrance.hidden_states(0)
        fill(block, owner, weights, set(below(weights, owner)), torch.device("cpu"))

    def run(hidden: torch.Tensor) -> torch.Tensor:
        result = block(hidden, *call.args, **call.kwargs)
        return result if isinstance(result, torch.Tensor) else result[0]

    with torch.no_grad():
        return with_sources(block, kind, kind.linears, run, states, CancelToken())


@pytest.mark.parametrize("kind", LISTED)
def test_derived_stages_are_those_that_were_listed(kind: str, tmp_path: Path) -> None:
    assert sourced(zoo.save(kind, tmp_path)).stages == LISTED[kind]


def test_scales_of_the_output_projection_go_into_values_that_queries_do_not_share(tmp_path: Path) -> None:
    assert sourced(toys.save_toy("phi", tmp_path)).stages[1] == Stage(("self_attn.dense",), "self_attn.v_proj")


def test_a_norm_behind_the_layer_takes_no_scales(tmp_path: Path) -> None:
    """OLMo 2 norms what a branch adds, so that its projections read the residual stream."""
    stages = sourced(zoo.save("olmo2", tmp_path)).stages
    assert stages[0] == Stage(QKV)
    assert stages[2] == Stage(("mlp.gate_proj", "mlp.up_proj"))
    assert stages[3].source == "mlp.up_proj"


def test_blocks_of_one_model_may_differ(tmp_path: Path) -> None:
    blocks = read_spec(str(zoo.save("deepseek_v3", tmp_path))).blocks
    assert blocks[0].linears[-1] == "mlp.down_proj"
    assert "mlp.experts.gate_up_proj" in blocks[3].linears
    assert len(blocks.kinds) == 2
