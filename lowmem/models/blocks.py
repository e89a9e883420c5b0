"""Decoder blocks by model family: where they are, which linear layers share an input, and in which order they run.

Names only, from config.json. Code that works block by block, such as quantization, reads the family's layout from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import Unsupported
from lowmem.messages import msg

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear layers of a block that share an input; names are relative to the block.

    Args:
        linears: in the order in which they run.
        source: the norm or linear layer that produces this input channel by channel, so that dividing its weights by a
            factor per channel divides the input; of a fused layer its last outputs. "" if there is none.
    """

    linears: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch of a block, which ends in the linear layer `output`.

    `in_tuple`: the module returns the result as the first of two values.
    """

    module: str
    output: str
    in_tuple: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks of a model.

    Args:
        path: of the list of blocks within the model, "model.layers".
        count: number of blocks.
        stages: in the order of computation; every quantizable layer of a block is in one.
        branches: attention and MLP.
        norm_offset: added by norms to their stored weights: 1 for Gemma.
    """

    path: str
    count: int
    stages: tuple[Stage, ...]
    branches: tuple[Branch, ...]
    norm_offset: float = 0.0

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.linears)


def _attention(*inputs: str, norm: str, module: str = "self_attn", output: str = "o_proj") -> tuple[Stage, Stage]:
    """The stages of attention: the projections after the norm, and the output projection."""
    names = tuple(f"{module}.{name}" for name in inputs)
    return Stage(names, norm), Stage((f"{module}.{output}",), names[-1])


def _branches(attention: str, mlp: str) -> tuple[Branch, Branch]:
    """From the full names of their last layers."""
    return Branch(attention.split(".")[0], attention, True), Branch(mlp.split(".")[0], mlp, False)


_QKV = ("q_proj", "k_proj", "v_proj")
_DOWN = Stage(("mlp.down_proj",), "mlp.up_proj")
_GATED = Layout(
    "model.layers",
    0,
    (
        *_attention(*_QKV, norm="input_layernorm"),
        Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        _DOWN,
    ),
    _branches("self_attn.o_proj", "mlp.down_proj"),
)
_GEMMA2 = replace(
    _GATED,
    stages=(*_GATED.stages[:2], Stage(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"), _DOWN),
    norm_offset=1.0,
)
_PHI3 = replace(
    _GATED,
    stages=(
        *_attention("qkv_proj", norm="input_layernorm"),
        Stage(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Stage(("mlp.down_proj",), "mlp.gate_up_proj"),
    ),
)
_PHI = Layout(
    "model.layers",
    0,
    (
        # Attention and MLP run in parallel after one norm; GELU before fc2 prevents folding factors into fc1.
        Stage((*(f"self_attn.{name}" for name in _QKV), "mlp.fc1"), "input_layernorm"),
        Stage(("self_attn.dense",), "self_attn.v_proj"),
        Stage(("mlp.fc2",)),
    ),
    _branches("self_attn.dense", "mlp.fc2"),
)
_GPT2 = Layout(
    "transformer.h",
    0,
    (
        Stage(("attn.c_attn",), "ln_1"),
        Stage(("attn.c_proj",), "attn.c_attn"),
        Stage(("mlp.c_fc",), "ln_2"),
        Stage(("mlp.c_proj",)),
    ),
    _branches("attn.c_proj", "mlp.c_proj"),
)

_FAMILIES: dict[str, Layout] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": replace(_GATED, norm_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
}

FAMILIES = tuple(_FAMILIES)


def refusal(config: Config) -> str | None:
    """Why this model cannot be processed block by block, None if it can."""
    model_type = str(config.get("model_type") or "")
    if isinstance(config.get("quantization_config"), Mapping):
        method = str(config["quantization_config"].get("quant_method") or msg("an unknown method"))
        return msg("The model is already quantized with {method}.", method=method)
    if model_type not in _FAMILIES:
        return msg(
            "Models of type {model_type!r} cannot be processed block by block yet; {families} can.",
            model_type=model_type,
            families=", ".join(FAMILIES),
        )
    if config.get("add_cross_attention"):
        return msg("The model has cross-attention, which needs an encoder's output.")
    return None


def stages(model_type: str) -> tuple[Stage, ...]:
    """The stages of a block of this family; none for a family that is not listed."""
    return _FAMILIES[model_type].stages if model_type in _FAMILIES else ()


def block_layout(config: Config) -> Layout:
    """The blocks of the model that config.json describes.

    Raises:
        Unsupported: with the sentence of `refusal`.
    """
    if problem := refusal(config):
        raise Unsupported(problem, msg("Choose the original weights of a model of one of these families."))
    layout = _FAMILIES[config["model_type"]]
    count = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads") not in (None, heads)
    # With grouped-query attention several heads read one value channel, so a factor per head cannot be folded there.
    stages = tuple(replace(s, source="") if shared and _sees_values(s, layout) else s for s in layout.stages)
    return replace(layout, count=count, stages=stages)


def _sees_values(stage: Stage, layout: Layout) -> bool:
    return layout.branches[0].output in stage.linears
