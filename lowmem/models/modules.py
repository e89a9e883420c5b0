"""Models without weights, and tensors put into them by name."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from lowmem.errors import CorruptModel, Unsupported, first_line, is_out_of_memory
from lowmem.messages import msg
from lowmem.models.experts import EXPERTS

log = logging.getLogger("lowmem.loader")


HALF = "_half_of_a_model"
"""An attribute of configurations whose files hold a larger model."""


def folder_config(folder: Path) -> Any:
    """transformers' configuration of the model in `folder`.

    Raises:
        CorruptModel: transformers cannot read config.json.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("cannot read the configuration of %s", folder, exc_info=True)
        raise CorruptModel(
            msg("config.json of {name} cannot be read: {error}", name=folder.name, error=first_line(error)),
            msg("Fetch the model again."),
        ) from error


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model that `folder` describes, with its parameters on the meta device, to compute in `dtype`.

    Of a model that also sees or hears, it is the part that reads and writes text.

    Raises:
        CorruptModel: see `folder_config`.
        Unsupported: transformers cannot build it.
    """
    config = folder_config(folder)
    try:
        return build(text_config(config), dtype)
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
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with _one_at_a_time, _EmptyOnMeta():
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    if not causal:
        _remove_towers(model)
    if not causal or type(model.config) is not type(config):
        setattr(model.config, HALF, True)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(EXPERTS)
    return model.eval().requires_grad_(False)


def writes_text(config: PreTrainedConfig) -> bool:
    """Whether transformers has a model of this configuration that continues text, perhaps text with images."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return isinstance(found, type) and issubclass(found, GenerationMixin)


def _remove_towers(model: PreTrainedModel) -> None:
    """Remove what a vision-language model does not read text with: towers of their own configuration, and projectors.

    What remains is the model of the text's configuration, the embedding, the head, and the modules that contain them.
    """
    text = model.config.get_text_config(decoder=True)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    halves = [module for module in models if module.config is text]
    towers = {module for module in models if module.config not in (model.config, text)}
    kept = {module for half in halves for module in half.modules()}
    kept |= {model.get_input_embeddings(), model.get_output_embeddings()}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in towers or kept.isdisjoint(child.modules()):
                setattr(module, name, None)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model within `config`, where transformers has it as a causal model of its own."""
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    if "tie_word_embeddings" in config.to_diff_dict():
        text.tie_word_embeddings = config.tie_word_embeddings
    setattr(text, HALF, True)
    return text


_one_at_a_time = threading.Lock()
"""transformers sets torch's default dtype while it builds a model: two threads would restore each other's."""

_here = threading.local()
"""`modes`: how many `_EmptyOnMeta` are active in this thread."""


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters that this thread makes are on the meta device; buffers keep their values.

    Uninitialized tensors, which is what layers make their parameters of, are created there at once: until a parameter
    is registered its memory is mapped, though never touched, and a process that may not map the 500 MB of a large
    embedding could not build the model. Other parameters are moved when they are registered.

    accelerate's `init_empty_weights` patches `nn.Module` for all threads: a model that another one builds meanwhile
    would lose its weights.
    """

    def __enter__(self) -> Any:
        _here.modes = getattr(_here, "modes", 0) + 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _here.modes -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _moved(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What is registered instead of a parameter; None for the parameter itself."""
    if parameter is None or parameter.is_meta or not getattr(_here, "modes", 0):
        return None
    moved = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    moved.__dict__.update(parameter.__dict__)
    return moved


register_module_parameter_registration_hook(_moved)  # type: ignore[arg-type]  # declared to return nothing


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
