"""Stored tensors that no part of the model reads.

A model that leaves out what its files hold answers, and answers wrongly: scales of codes that were taken for numbers,
norms or biases that config.json does not mention. So every tensor is read, or known to be without effect.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from transformers import PreTrainedModel

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.modules import HALF

HARMLESS = (
    r"rotary_emb\.\w+$|(^|\.)(original_)?inv_freq$|(^|\.)position_ids$|(^|\.)relative_position_index$",  # computed
    r"(^|\.)(masked_bias|causal_mask|attn_mask|version|_float_tensor)$|(^|\.)attn(\.attention)?\.bias$",  # masks
    r"\.(input|output|activation|prob_output|[qkv]|kv|kv_cache)_(scale|global_scale|zero_point|min|max|amax)s?$",
    r"\.weight_(shape|observer\.\w+)$",  # of activations, of a cache and of shapes
    r"(^|\.)(mtp\w*|nextn\w*|medusa\w*|eagle\w*)\.",  # further heads that draft tokens
    r"^(v_head|value_head|reward_head|score|classifier|summary|cls|nsp)\.",  # heads of other tasks
)  # fmt: skip
"""Names of tensors that do not change what a model computes."""

DRAFT_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Fields of configurations whose files hold more layers than the model, which draft tokens."""


def check_unused(model: PreTrainedModel, unused: Collection[str], prefix: str) -> None:
    """Refuse files of which the model leaves tensors `unused`.

    Args:
        prefix: what a larger model puts in front of the names of this one.

    Raises:
        CorruptModel: tensors that are not known to be without effect; the first is named.
    """
    lost = sorted(set(unused) - set(_harmless(model, unused, prefix)))
    if lost:
        raise CorruptModel(
            msg(
                "{count} tensors belong to no layer of a {model_type} model, starting with {first}: without them its answers would be wrong.",
                count=len(lost),
                model_type=model.config.model_type,
                first=lost[0][:80],
            ),
            msg("Check that config.json belongs to these files."),
        )


def _harmless(model: PreTrainedModel, unused: Iterable[str], prefix: str) -> Iterator[str]:
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    patterns = [re.compile(pattern) for pattern in (*HARMLESS, *_ignored_by_transformers(model))]
    half = bool(prefix) or decoder is not config or getattr(config, HALF, False)
    drafts = any(getattr(decoder, field, None) for field in DRAFT_LAYERS)
    modules = {name for name, _ in model.named_modules()}
    roots = {name for name, module in model.named_modules() if module in (model, model.base_model)}
    for name in unused:
        if (
            any(pattern.search(name) for pattern in patterns)
            or (half and _part(name.removeprefix(prefix), modules) in roots)
            or (drafts and re.search(r"\.layers\.\d+\.", name) and _part(name, modules).endswith("layers"))
        ):
            yield name


def _ignored_by_transformers(model: PreTrainedModel) -> Iterator[str]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield from module._keys_to_ignore_on_load_unexpected or ()


def _part(name: str, modules: Collection[str]) -> str:
    """The innermost module of the model that a tensor of this name would be in, "" for the model itself."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
