"""Models without weights, and tensors put into them by name."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowmem.errors import Unsupported, first_line
from lowmem.messages import msg

log = logging.getLogger("lowmem.loader")


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model that `folder` describes, with its parameters on the meta device, to compute in `dtype`.

    Raises:
        Unsupported: transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        log.info("cannot build the model of %s", folder, exc_info=True)
        raise Unsupported(
            msg("transformers cannot build this model: {error}", error=first_line(error)),
            msg("Choose a causal language model of a known family."),
        ) from error
    return model.eval().requires_grad_(False)


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
