"""Models without weights, and tensors put into them by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from lowmem.errors import Unsupported, first_line, is_out_of_memory
from lowmem.messages import msg
from lowmem.models.experts import EXPERTS

log = logging.getLogger("lowmem.loader")


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model that `folder` describes, with its parameters on the meta device, to compute in `dtype`.

    Of a model that also sees or hears, it is the part that reads and writes text.

    Raises:
        Unsupported: transformers cannot build it.
    """
    try:
        return build(
            text_config(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)), dtype
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("cannot build the model of %s", folder, exc_info=True)
        raise Unsupported(
            msg("transformers cannot build this model: {error}", error=first_line(error)),
            msg("Choose a causal language model of a known family."),
        ) from error


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model of a configuration, with its parameters on the meta device."""
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(EXPERTS)
    return model.eval().requires_grad_(False)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model within `config`, where transformers has it as a causal model of its own."""
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    if "tie_word_embeddings" in config.to_diff_dict():
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


class _EmptyOnMeta(TorchFunctionMode):
    """Creates uninitialized tensors, which is what layers make their parameters of, on the meta device at once.

    `init_empty_weights` moves a parameter there once it exists. Until then its memory is mapped, though never touched,
    and a process that may not map the 500 MB of a large embedding could not build the model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter, or the buffer if there is one, called `name` (dotted for those of submodules).

    Bypasses `nn.Module.__setattr__`, which is slow and rejects other shapes and dtypes.
    """
    owner, _, member = name.rpartition(".")
    target = module.get_submodule(owner)
    if member in target._buffers:
        target._buffers[member] = tensor
    elif isinstance(tensor, nn.Parameter):
        target._parameters[member] = tensor
    else:
        target._parameters[member] = nn.Parameter(tensor, requires_grad=False)
