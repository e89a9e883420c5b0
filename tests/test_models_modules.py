"""Models without weights."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import toys
import transformers
from families import zoo

from lowmem.errors import Unsupported
from lowmem.models.modules import build
from lowmem.models.source import read_spec

SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_another_thread_keeps_its_weights_while_empty_models_are_built() -> None:
    done, empty = threading.Event(), list[transformers.PreTrainedModel]()

    def building() -> None:
        while not done.is_set():
            empty[:] = [build(toys.config("llama"))]

    thread = threading.Thread(target=building)
    thread.start()
    try:
        for _ in range(30):
            model = transformers.AutoModelForCausalLM.from_config(toys.config("llama"))
            assert not any(parameter.is_meta for parameter in model.parameters())
    finally:
        done.set()
        thread.join()
    assert all(parameter.is_meta for parameter in empty[0].parameters())
    assert not any(buffer.is_meta for buffer in empty[0].buffers())


@pytest.mark.parametrize("kind", ["chameleon", "glm4v", "qwen3_vl", "step3p7"])
def test_of_a_vision_language_model_only_what_reads_text_is_built(kind: str) -> None:
    model = build(zoo.config(kind))
    text = model.config.get_text_config()
    assert model.get_input_embeddings().weight.shape == (text.vocab_size, text.hidden_size)
    assert model.get_output_embeddings().out_features == text.vocab_size
    assert not [name for name, _ in model.named_parameters() if "vis" in name or "vq" in name or "projector" in name]


def test_towers_are_neither_read_nor_counted(tmp_path: Path) -> None:
    zoo.save("qwen3_vl", tmp_path)
    spec = read_spec(str(tmp_path))
    assert sum(tensor.nbytes for tensor in spec.tensors) < 0.9 * spec.size_on_disk
    assert not [tensor.name for tensor in spec.tensors if "visual" in tensor.name]


def test_a_model_that_needs_an_image_is_refused(tmp_path: Path) -> None:
    config = transformers.BlipConfig(text_config=SMALL, vision_config=SMALL)
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"cannot read text alone.*pixel_values"):
        read_spec(str(tmp_path))
