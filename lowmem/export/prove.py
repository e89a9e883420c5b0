"""Is the graph the model? Logits of an exported graph against the original's, on real text, with and without cache.

fp32 must agree to 1e-3; a quantized graph is held to a divergence. Both are measured twice: over a text read at once
("prefill"), and over tokens that see the text before them through the cache ("decode"), which a graph of its own may
have filled.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.datasets.texts import evaluation_text
from lowmem.events import CancelToken, Step
from lowmem.export.reference import streamed_model
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.quantization import Quantization
from lowmem.planning.exported import PROOF_ROWS, proof_windows
from lowmem.runtime.onnx.manifest import GRAPH
from lowmem.runtime.onnx.model import OnnxModel, open_session

EXACT = 1e-3
"""Largest difference of a logit that fp32 may show."""

GATES = {"fp16": 0.02, "int8": 0.05, "int4": 0.6}
"""Mean KL divergence in nats up to which a graph is offered. What 4 bits cost depends on the model; more than this is no model."""

TAKEN_OVER = 0.05
"""The gate of codes that were taken over from a quantized checkpoint: only activations are rounded anew."""

ENCODER_ERROR = 0.1
"""Relative error of a quantized encoder's states."""

STEPS = 24
"""Tokens of each window that are decoded one by one."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `tokens` tokens: largest difference of a logit, mean KL divergence in nats, share of equal best tokens."""

    max_difference: float
    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Proof:
    """`gate` is what was asked for, `passed` whether both ways keep it; `text` names what was read."""

    prefill: Agreement
    decode: Agreement
    gate: str
    passed: bool
    text: str

    def sentence(self) -> str:
        worst = max(self.prefill.max_difference, self.decode.max_difference)
        kl = max(self.prefill.kl, self.decode.kl)
        agreed = min(self.prefill.agreement, self.decode.agreement)
        verdict = "Proven" if self.passed else "Failed"
        return f"{verdict}: largest difference {worst:.2g}, KL {kl:.4f}, same best token {agreed:.1%} ({self.gate})."

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prove(
    folder: Path, exported: Path, stored: Quantization | None, cancel: CancelToken
) -> Generator[Step, None, Proof]:
    """Compare the graph in `exported` with the model in `folder`; the return value is the proof."""
    yield Step(0, 3, "Proving it: asking the original")
    text, windows = _windows(folder)
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        model = streamed_model(folder, checkpoint, stored)
        model.register_forward_pre_hook(lambda *_: cancel.check())
        wanted = model(input_ids=windows, use_cache=False).logits.float()
    del model
    cancel.check()
    yield Step(1, 3, "Proving it: asking the graph")
    graph = OnnxModel(exported)
    prefill = _agreement(wanted, torch.cat([graph(window[None]).logits for window in windows]))
    cancel.check()
    yield Step(2, 3, "Proving it: asking the graph token by token")
    decode = _agreement(wanted[:, -STEPS:], torch.cat([_decoded(graph, window) for window in windows]))
    gate, passed = _judged(graph.manifest.precision, stored is not None, prefill, decode)
    yield Step(3, 3, "Proven" if passed else "Failed")
    return Proof(prefill, decode, gate, passed, text)


def prove_encoder(folder: Path, exported: Path, precision: str) -> Generator[Step, None, Proof]:
    """Compare hidden states instead, over drawn tokens of two lengths, the shorter one padded.

    `kl` is the relative error of a state here and `agreement` the share of states that point the same way (cosine above 0.99).
    """
    from transformers import AutoModel

    yield Step(0, 2, "Proving it: asking the original")
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    with torch.inference_mode():
        wanted = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    del model
    yield Step(1, 2, "Proving it: asking the graph")
    session = open_session(exported / GRAPH)
    found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]).float()
    states, others = wanted[mask.bool()], found[mask.bool()]
    difference = float((states - others).abs().max().nan_to_num(float("inf")))
    error = float((states - others).norm() / states.norm())
    alike = float((functional.cosine_similarity(states, others) > 0.99).float().mean())
    agreement = Agreement(difference, error, alike, len(states))
    limit = EXACT if precision == "fp32" else ENCODER_ERROR
    measured = difference if precision == "fp32" else error
    gate = f"{'difference' if precision == 'fp32' else 'relative error'} up to {limit:g}"
    yield Step(2, 2, "Compared")
    return Proof(agreement, agreement, gate, measured <= limit, "random tokens")


def _windows(folder: Path) -> tuple[str, Tensor]:
    """A text's name, and token ids [windows, tokens] of it; without a tokenizer ids are drawn."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    decoder = config.get_text_config(decoder=True)
    count, length = proof_windows(decoder.vocab_size, decoder.max_position_embeddings)
    text = evaluation_text()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text.text[: 16 * count * length], add_special_tokens=False)["input_ids"][: count * length]
        if len(ids) == count * length and max(ids) < decoder.vocab_size:
            return text.name, torch.tensor(ids).view(count, length)
    except (OSError, ValueError):
        pass
    generator = torch.Generator().manual_seed(0)
    return "random tokens", torch.randint(decoder.vocab_size, (count, length), generator=generator)


def _decoded(graph: OnnxModel, window: Tensor) -> Tensor:
    """Logits [1, STEPS, vocabulary] of the last tokens, one by one after the others were read as a prompt."""
    cache = graph.make_cache(1, len(window))
    first = len(window) - STEPS
    logits = []
    for start, end in [(0, first + 1), *((at, at + 1) for at in range(first + 1, len(window)))]:
        output = graph(window[None, start:end], past_key_values=cache, logits_to_keep=1)
        logits.append(output.logits[:, -1:])
    return torch.cat(logits, 1)


def _agreement(wanted: Tensor, found: Tensor) -> Agreement:
    """Row by row, since log-probabilities of all would be three times the logits."""
    difference = kl = 0.0
    agreed = tokens = 0
    for one, other in zip(wanted.flatten(0, 1).split(PROOF_ROWS), found.flatten(0, 1).split(PROOF_ROWS), strict=True):
        p, q = torch.log_softmax(one, -1), torch.log_softmax(other, -1)
        # NaN must not pass as the smaller one.
        difference = float(np.fmax(difference, float((one - other).abs().max().nan_to_num(float("inf")))))
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(one)
    return Agreement(difference, max(0.0, kl / tokens), agreed / tokens, tokens)


def _judged(precision: str, taken_over: bool, *found: Agreement) -> tuple[str, bool]:
    if precision == "fp32" and not taken_over:
        return f"difference up to {EXACT:g}", all(one.max_difference <= EXACT for one in found)
    limit = TAKEN_OVER if taken_over else GATES[precision]
    return f"KL up to {limit:g}", all(one.kl <= limit for one in found)
