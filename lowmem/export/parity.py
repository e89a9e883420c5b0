"""The parity check: logits of an exported graph against those of the original model, on real text.

Two things are checked apart. *Is the graph the one that was meant?* Its weights are compared with the original's, rounded in the
same way and multiplied out in fp32 on both sides; only the order of additions may differ, so that one damaged matrix shows.
*Is it good enough to use?* What rounding and the graph's own arithmetic cost together is the mean KL divergence from the
original, which is limited per precision.

Both are measured for a text processed at once ("prefill") and for tokens that see the text before them through the KV cache
("decode"), which the separate prefill graph may have filled. A logit that is not a finite number fails either.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from lowmem.datasets.texts import evaluation_text
from lowmem.errors import is_out_of_memory
from lowmem.events import CancelToken, Step
from lowmem.export.arithmetic import open_in_fp32
from lowmem.export.linears import as_dtype
from lowmem.export.reference import Rounding, roundings, streamed_model
from lowmem.machine.monitor import release_memory
from lowmem.messages import msg
from lowmem.models.cache_argument import cache_argument
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.meta_model import context_limit
from lowmem.models.modules import folder_config
from lowmem.models.quantization import Quantization
from lowmem.planning.exported import PARITY_ROWS, parity_windows
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import GRAPH, PREFILL, read_manifest
from lowmem.runtime.onnx.model import OnnxModel, open_session

EXACT = 1e-3
"""Largest difference of a logit where both sides compute in fp32."""

HALF = 2e-4
"""Largest mean KL divergence in nats between fp16 weights multiplied in fp16 and in fp32."""

HALF_MAX = torch.finfo(torch.float16).max

GATES = {"fp16": 0.02, "int8": 0.05, "int4": 0.6}
"""Largest mean KL divergence from the original in nats. The loss of 4 bits depends on the model; beyond this it is unusable."""

STORED_GATE = 0.05
"""The same for the codes of a quantized checkpoint: only activations are rounded in addition."""

HALF_ERROR = 0.02
"""Largest relative error of the hidden states of an fp16 encoder from the same weights multiplied in fp32."""

ENCODER_ERROR = 0.1
"""Largest relative error of the hidden states of a quantized encoder."""

STEPS = 24
"""Tokens of each window that are decoded one at a time."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `tokens` tokens: largest difference of a logit, mean KL divergence in nats, share of top-1 matches.

    Difference and divergence are infinite if any logit is not finite.
    """

    max_difference: float
    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """
    Args:
        prefill, decode: the graph against the original.
        gate: the limit, of the comparison that failed if one did.
        passed: whether all comparisons keep their limits.
        text: name of the evaluation text.
        weights: the worse of prefill and decode against the original with its weights rounded as in the graph; None for fp32,
            where that is the original.
    """

    prefill: Agreement
    decode: Agreement
    gate: str
    passed: bool
    text: str
    weights: Agreement | None = None

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
        if not math.isfinite(worst):
            return msg("Failed: the graph computes numbers that are not finite.")
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
    folder: Path, exported: Path, stored: Quantization | None, options: ExportOptions, cancel: CancelToken
) -> Generator[Step, None, ParityCheck]:
    """Compare the graph in `exported`, written with `options`, with the model in `folder`; the return value is the check."""
    text, windows = _windows(folder)
    weights = None
    activations = Range()
    if stored is not None or options.precision != "fp32":
        yield Step(0, 5, msg("Verifying: running the original with rounded weights"))
        graph_kind = read_manifest(exported).kind
        rounded = roundings(graph_kind, options, cancel)
        wanted = _rounded(
            folder, stored, rounded, windows, cancel, activations if options.precision == "fp16" else None
        )
        yield Step(1, 5, msg("Verifying: comparing the weights"))
        # Half precision has no operators that multiply in fp32.
        opened = open_session if options.precision == "fp16" else open_in_fp32
        graph = OnnxModel(exported, opened=opened, arena=False)
        weights = _worse(*_compared(graph, *wanted, windows, cancel))
        del graph, wanted
        release_memory()
    yield Step(2, 5, msg("Verifying: running the original"))
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        model = _stoppable(streamed_model(folder, checkpoint, stored), cancel)
        logits = model(input_ids=windows, use_cache=False).logits.float()
    del model
    release_memory()
    cancel.check()
    yield Step(3, 5, msg("Verifying: running the graph"))
    # An arena would map up to twice of what it holds, more than the estimate of an export that a cap enforces.
    prefill, decode = _compared(OnnxModel(exported, arena=False), logits, logits[:, -STEPS:], windows, cancel)
    gate, passed = _judge(options.precision, stored is not None, weights, prefill, decode)
    if activations.largest > HALF_MAX:
        gate, passed = msg("activations reach {largest:,.0f}, beyond fp16", largest=activations.largest), False
    yield Step(5, 5, msg("Verified") if passed else msg("Failed"))
    return ParityCheck(prefill, decode, gate, passed, text, weights)


def _rounded(
    folder: Path,
    stored: Quantization | None,
    found: dict[str, Rounding],
    windows: Tensor,
    cancel: CancelToken,
    activations: Range | None,
) -> tuple[Tensor, Tensor]:
    """Logits of the original with rounded weights: of all tokens at once, and of the last `STEPS` decoded."""
    first = windows.shape[1] - STEPS
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        main = _stoppable(streamed_model(folder, checkpoint, stored, found[GRAPH]), cancel)
        if activations is not None:
            activations.watch(main)
        logits = main(input_ids=windows, use_cache=False).logits.float()
        if PREFILL not in found:
            return logits, logits[:, -STEPS:]
        reader = _stoppable(streamed_model(folder, checkpoint, stored, found[PREFILL]), cancel)
        cached = {cache_argument(main): DynamicCache(config=main.config), "use_cache": True}
        reader(input_ids=windows[:, :first], logits_to_keep=1, **cached)
        return logits, main(input_ids=windows[:, first:], **cached).logits.float()


def _compared(
    graph: OnnxModel, wanted: Tensor, decoded: Tensor, windows: Tensor, cancel: CancelToken
) -> tuple[Agreement, Agreement]:
    """Agreement of a graph's logits, read at once and decoded; one window's logits are in memory at a time."""
    graph.register_forward_pre_hook(lambda *_: cancel.check())
    prefill = _agreement((one, graph(window[None]).logits[0]) for one, window in zip(wanted, windows, strict=True))
    decode = _agreement((one, _decoded(graph, window)[0]) for one, window in zip(decoded, windows, strict=True))
    return prefill, decode


class Range:
    """The largest absolute activation between the modules of a model.

    ONNX Runtime keeps the activations of an fp16 graph in fp32 where a CPU has no operator in half precision; on a GPU they
    would overflow.
    """

    def __init__(self) -> None:
        self.largest = 0.0

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_hook(self._see)

    def _see(self, _module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        for values in (*inputs, output):
            if isinstance(values, Tensor) and values.is_floating_point():
                self.largest = max(self.largest, float(values.abs().max().nan_to_num(math.inf)))


def _stoppable(model: Any, cancel: CancelToken) -> Any:
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: cancel.check())
    return model


def check_encoder(
    folder: Path, exported: Path, options: ExportOptions, cancel: CancelToken
) -> Generator[Step, None, ParityCheck]:
    """Compare hidden states instead, for random tokens in two rows, the shorter one padded.

    `kl` is the relative error of the states and `agreement` the share of states with a cosine similarity above 0.99.
    """
    from transformers import AutoModel

    precision = options.precision
    yield Step(0, 3, msg("Verifying: running the original"))
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    with torch.inference_mode():
        wanted = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        weights = None
        if precision != "fp32":
            yield Step(1, 3, msg("Verifying: comparing the weights"))
            _round(model, roundings("encoder", options, cancel)[GRAPH])
            rounded = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            opened = open_session if precision == "fp16" else open_in_fp32
            found = torch.from_numpy(opened(exported / GRAPH).run(None, feeds)[0]).float()
            weights = _states_agreement(rounded, found[mask.bool()])
    del model
    yield Step(2, 3, msg("Verifying: running the graph"))
    found = torch.from_numpy(open_session(exported / GRAPH).run(None, feeds)[0]).float()
    states = _states_agreement(wanted, found[mask.bool()])
    gate, passed = _judge_states(precision, weights, states)
    yield Step(3, 3, msg("Compared"))
    return ParityCheck(states, states, gate, passed, msg("random tokens"), weights)


def _round(model: nn.Module, rounding: Rounding) -> None:
    """Round the weights of a model in place."""
    for name, module in model.named_modules():
        for member, values in module.named_parameters(recurse=False):
            values.copy_(
                rounding.weight(module, name, values, is_head=False)
                if member == "weight"
                else as_dtype(values, rounding.dtype)
            )


def _states_agreement(wanted: Tensor, found: Tensor) -> Agreement:
    difference = float((wanted - found).abs().max().nan_to_num(float("inf")))
    error = float(((wanted - found).norm() / wanted.norm()).nan_to_num(float("inf")))
    alike = float((functional.cosine_similarity(wanted, found) > 0.99).float().mean())
    return Agreement(difference, error, alike, len(wanted))


def _windows(folder: Path) -> tuple[str, Tensor]:
    """A text's name, and token ids [windows, tokens] of it; random ids for a model without a tokenizer."""
    from transformers import AutoTokenizer

    config = folder_config(folder)
    decoder = config.get_text_config(decoder=True)
    count, length = parity_windows(decoder.vocab_size, context_limit(decoder))
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


def _agreement(pairs: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Of logits [tokens, vocabulary] of both sides, in blocks of rows: log-probabilities of all would take three times as much."""
    difference = kl = 0.0
    agreed = tokens = 0
    for wanted, found in pairs:
        for one, other in zip(wanted.split(PARITY_ROWS), found.split(PARITY_ROWS), strict=True):
            if not (one.isfinite().all() and other.isfinite().all()):
                difference = kl = math.inf
            p, q = torch.log_softmax(one, -1), torch.log_softmax(other, -1)
            if math.isfinite(kl):
                difference = max(difference, float((one - other).abs().max()))
                kl += float((p.exp() * (p - q)).sum())
            agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
            tokens += len(one)
    return Agreement(difference, max(0.0, kl / tokens), agreed / tokens, tokens)


def _worse(*found: Agreement) -> Agreement:
    return Agreement(
        max(one.max_difference for one in found),
        max(one.kl for one in found),
        min(one.agreement for one in found),
        sum(one.tokens for one in found),
    )


def _judge(precision: str, stored: bool, weights: Agreement | None, *found: Agreement) -> tuple[str, bool]:
    """The limit, and whether it is kept: of the weights first, then of the whole graph."""
    if precision == "fp32" and not stored:
        return msg("difference up to {exact:g}", exact=EXACT), all(one.max_difference <= EXACT for one in found)
    assert weights is not None  # measured for all that is rounded
    if precision == "fp16" and weights.kl > HALF:
        return msg("KL {kl:.2g} from the rounded weights, up to {limit:g}", kl=weights.kl, limit=HALF), False
    if precision != "fp16" and weights.max_difference > EXACT:
        return _differs(weights), False
    limit = STORED_GATE if stored else GATES[precision]
    return msg("KL up to {limit:g}", limit=limit), all(one.kl <= limit for one in found)


def _judge_states(precision: str, weights: Agreement | None, states: Agreement) -> tuple[str, bool]:
    """The same for an encoder."""
    if precision == "fp32":
        return msg("difference up to {limit:g}", limit=EXACT), states.max_difference <= EXACT
    assert weights is not None  # measured for all that is rounded
    if precision != "fp16" and weights.max_difference > EXACT:
        return _differs(weights), False
    if precision == "fp16" and weights.kl > HALF_ERROR:
        return msg("error {kl:.2g} from the rounded weights, up to {limit:g}", kl=weights.kl, limit=HALF_ERROR), False
    return msg("relative error up to {limit:g}", limit=ENCODER_ERROR), states.kl <= ENCODER_ERROR


def _differs(weights: Agreement) -> str:
    return msg(
        "difference {difference:.2g} from the rounded weights, up to {exact:g}",
        difference=weights.max_difference,
        exact=EXACT,
    )
