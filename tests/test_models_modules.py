"""Models without weights."""

from __future__ import annotations

import threading

import toys
import transformers

from lowmem.models.modules import build


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
