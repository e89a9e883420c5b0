"""The parity check: logits of an exported graph against those of the original model, on real text.

In fp32 every logit must agree to 1e-3; for a quantized graph the mean KL divergence is limited. Both are measured twice:
for a text processed at once ("prefill") and for tokens that see the text before them through the KV cache ("decode"),
which the separate prefill graph may have filled.
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
from lowmem.errors import is_out_of_memory
from lowmem.events import CancelToken, Step
from lowmem.export.reference import streamed_model
from lowmem.messages import msg
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.quantization import Quantization
from lowmem.planning.exported import PARITY_ROWS, parity_windows
from lowmem.runtime.onnx.manifest import GRAPH
from lowmem.runtime.onnx.model import OnnxModel, open_session

EXACT = 1e-3
"""Largest difference of a logit in fp32."""

GATES = {"fp16": 0.02, "int8": 0.05, "int4": 0.6}
"""Largest mean KL divergence in nats. The loss of 4 bits depends on the model; beyond this it is unusable."""

STORED_GATE = 0.05
"""The same for the codes of a quantized checkpoint: only activations are rounded in addition."""

ENCODER_ERROR = 0.1
"""Largest relative error of the hidden states of a quantized encoder."""

STEPS = 24
"""Tokens of each window that are decoded one at a time."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `tokens` tokens: largest difference of a logit, mean KL divergence in nats, share of top-1 matches."""

    max_difference: float
    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """`gate` is the limit, `passed` whether prefill and decode keep it, `text` the name of the evaluation text."""

    prefill: Agreement
    decode: Agreement
    gate: str
    passed: bool
    text: str

    def sentence(self) -> str:
        worst = max(self.prefill.max_difference, self.decode.max_difference)
        kl = max(self.prefill.kl, self.decode.kl)
        agreed = min(self.prefill.agreement, self.decode.agreement)
        if self.passed:
            return msg(
                "Verified: largest difference {worst:.2g}, KL {kl:.4f}, {agreed:.1%} top-1 match ({gate}).",
                worst=worst,
                kl=kl,
                agreed=agreed,
                gate=self.gate,
            )
        return msg(
            "Failed: largest difference {worst:.2g}, KL {kl:.4f}, {agreed:.1%} top-1 match ({gate}).",
            worst=worst,
            kl=kl,
            agreed=agreed,
            gate=self.gate,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_decoder(
    folder: Path, exported: Path, stored: Quantization | None, cancel: CancelToken
) -> Generator[Step, None, ParityCheck]:
    """Compare the graph in `exported` with the model in `folder`; the return value is the check."""
    yield Step(0, 3, msg("Verifying: running the original"))
    text, windows = _windows(folder)
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        model = streamed_model(folder, checkpoint, stored)
        model.register_forward_pre_hook(lambda *_: cancel.check())
        wanted = model(input_ids=windows, use_cache=False).logits.float()
    del model
    cancel.check()
    yield Step(1, 3, msg("Verifying: running the graph"))
    graph = OnnxModel(exported)
    prefill = _agreement(wanted, torch.cat([graph(window[None]).logits for window in windows]))
    cancel.check()
    yield Step(2, 3, msg("Verifying: decoding with the graph"))
    decode = _agreement(wanted[:, -STEPS:], torch.cat([_decoded(graph, window) for window in windows]))
    gate, passed = _judge(graph.manifest.precision, stored is not None, prefill, decode)
    yield Step(3, 3, msg("Verified") if passed else msg("Failed"))
    return ParityCheck(prefill, decode, gate, passed, text)


def check_encoder(folder: Path, exported: Path, precision: str) -> Generator[Step, None, ParityCheck]:
    """Compare hidden states instead, for random tokens in two rows, the shorter one padded.

    `kl` is the relative error of the states and `agreement` the share of states with a cosine similarity above 0.99.
    """
    from transformers import AutoModel

    yield Step(0, 2, msg("Verifying: running the original"))
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    with torch.inference_mode():
        wanted = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    del model
    yield Step(1, 2, msg("Verifying: running the graph"))
    session = open_session(exported / GRAPH)
    found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]).float()
    states, others = wanted[mask.bool()], found[mask.bool()]
    difference = float((states - others).abs().max().nan_to_num(float("inf")))
    error = float((states - others).norm() / states.norm())
    alike = float((functional.cosine_similarity(states, others) > 0.99).float().mean())
    agreement = Agreement(difference, error, alike, len(states))
    limit = EXACT if precision == "fp32" else ENCODER_ERROR
    measured = difference if precision == "fp32" else error
    gate = (
        msg("difference up to {limit:g}", limit=limit)
        if precision == "fp32"
        else msg("relative error up to {limit:g}", limit=limit)
    )
    yield Step(2, 2, msg("Compared"))
    return ParityCheck(agreement, agreement, gate, measured <= limit, msg("random tokens"))


def _windows(folder: Path) -> tuple[str, Tensor]:
    """A text's name, and token ids [windows, tokens] of it; random ids for a model without a tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    decoder = config.get_text_config(decoder=True)
    count, length = parity_windows(decoder.vocab_size, decoder.max_position_embeddings)
    text = evaluation_text()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text.text[: 16 * count * length], add_special_tokens=False)["input_ids"][: count * length]
        if len(ids) == count * length and max(ids) < decoder.vocab_size:
            return text.name, torch.tensor(ids).view(count, length)
    except (OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
    generator = torch.Generator().manual_seed(0)
    return msg("random tokens"), torch.randint(decoder.vocab_size, (count, length), generator=generator)


def _decoded(graph: OnnxModel, window: Tensor) -> Tensor:
    """Logits [1, STEPS, vocabulary] of the last tokens, decoded one at a time after a prefill of the others."""
    cache = graph.make_cache(1, len(window))
    first = len(window) - STEPS
    logits = []
    for start, end in [(0, first + 1), *((at, at + 1) for at in range(first + 1, len(window)))]:
        output = graph(window[None, start:end], past_key_values=cache, logits_to_keep=1)
        logits.append(output.logits[:, -1:])
    return torch.cat(logits, 1)


def _agreement(wanted: Tensor, found: Tensor) -> Agreement:
    """In blocks of rows, since the log-probabilities of all would take three times the memory of the logits."""
    difference = kl = 0.0
    agreed = tokens = 0
    for one, other in zip(wanted.flatten(0, 1).split(PARITY_ROWS), found.flatten(0, 1).split(PARITY_ROWS), strict=True):
        p, q = torch.log_softmax(one, -1), torch.log_softmax(other, -1)
        # NaN must not pass as the smaller one.
        difference = float(np.fmax(difference, float((one - other).abs().max().nan_to_num(float("inf")))))
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(one)
    return Agreement(difference, max(0.0, kl / tokens), agreed / tokens, tokens)


def _judge(precision: str, stored: bool, *found: Agreement) -> tuple[str, bool]:
    if precision == "fp32" and not stored:
        return msg("difference up to {exact:g}", exact=EXACT), all(one.max_difference <= EXACT for one in found)
    limit = STORED_GATE if stored else GATES[precision]
    return msg("KL up to {limit:g}", limit=limit), all(one.kl <= limit for one in found)
