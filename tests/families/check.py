"""What lowmem does with one toy, action by action, against transformers' own results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import toys
import transformers

import lowmem
from families import matrix, zoo
from lowmem.errors import CorruptModel, first_line
from lowmem.generate.cache.block import DequantizeBuffers
from lowmem.generate.cache.capability import cache_use
from lowmem.kernels import layouts
from lowmem.kernels.int8_linear import Int8Linear
from lowmem.machine import bandwidth
from lowmem.offload.run import BlockPlacement, plan_for, run

LENGTHS = (21, 47, 34)
"""Tokens of the three prompts, all beyond the toys' sliding windows."""

NEW_TOKENS = 24
SEEDS = range(4)
"""Random prompts to choose from, see `_clearest`."""

GREEDY = lowmem.GenerateOptions(greedy=True, max_new_tokens=NEW_TOKENS)
GOAL = lowmem.Goal(context=256, precision="fp32", backend="torch", device="cpu")
CALIBRATION = {"samples": 4, "length": 64}

FARTHEST = {"int8": 0.35, "rtn": 0.35, "gptq": 1.0, "awq": 1.0}
"""Most relative error of logits (RMS of the difference over RMS of the logits) by action.

Random wide weights enlarge every rounding, and experts change; a tensor in the wrong place gives 1.4.
"""


class Wrong(Exception):
    """A result differs from what it has to be."""


class Incomparable(Exception):
    """Transformers itself has no answers to compare with."""


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the three prompts: texts of `NEW_TOKENS` tokens and, per prompt, logits [tokens, vocabulary]."""

    prompts: list[str]
    texts: list[str]
    logits: list[torch.Tensor]


class Case:
    """A toy's folder, transformers' answers and a session that holds the toy in fp32.

    Actions ask for the session first: a refusal needs no answers, which take the most time.
    """

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root = kind, root
        self.folder = root / "toy"

    @functools.cached_property
    def reference(self) -> Reference:
        try:
            model = zoo.reference(self.kind, self.folder)
            prompts = [_clearest(model, length) for length in LENGTHS]
            # Some families' own cache changes their answers (MiniMax): lowmem has found that out and runs without one.
            cached = cache_use(self.session._loaded.model).cached  # type: ignore[union-attr]
            found = [_generated(model, prompt, use_cache=cached).sequences[0] for prompt in prompts]
            texts = [text_of(ids[length:]) for ids, length in zip(found, LENGTHS, strict=True)]
            with torch.inference_mode():
                logits = [model(input_ids=_ids(prompt)).logits[0] for prompt in prompts]
        except Exception as error:
            raise Incomparable(f"{type(error).__name__}: {first_line(error)}") from error
        return Reference(prompts, texts, logits)

    @functools.cached_property
    def session(self) -> lowmem.Session:
        return self.loaded(self.folder)

    def loaded(self, folder: Path, **goal: Any) -> lowmem.Session:
        session = lowmem.Session()
        for _ in session.load(session.plan_for(str(folder), replace(GOAL, **goal))):
            pass
        return session


def _ids(prompt: str) -> torch.Tensor:
    return torch.tensor([zoo.tokenizer()(prompt, add_special_tokens=False).input_ids])


def _clearest(model: Any, length: int) -> str:
    """Of a few random prompts the one whose best tokens are clearest.

    Rounding in another order of additions must not change a token; an early end would hide the later ones.
    """
    found = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(1000 * length + seed)
        letters = torch.randint(ord("a"), ord("z") + 1, (length,), generator=generator).tolist()
        prompt = "".join(map(chr, letters))
        out = _generated(model, prompt)
        new = out.sequences[0, length:]
        best = torch.stack(out.logits)[:, 0].topk(2).values
        gap = float((best[:, 0] - best[:, 1]).min() / torch.stack(out.logits).std())
        found.append((len(new), gap > 1e-4, len(set(new.tolist())), gap, prompt))
    return max(found)[-1]


def _generated(model: Any, prompt: str, **options: Any) -> Any:
    """What transformers' `generate` makes of a prompt."""
    ids = _ids(prompt)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=toys.PAD,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def text_of(ids: torch.Tensor) -> str:
    return zoo.tokenizer().decode(ids, skip_special_tokens=True)


def answer(session: lowmem.Session, prompt: str, options: lowmem.GenerateOptions = GREEDY) -> str:
    return _joined(session.generate(prompt, options, raw=True))


def _joined(events: Iterator[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, lowmem.Chunk))


def equal(found: Sequence[str], expected: Sequence[str], what: str) -> None:
    """
    Raises:
        Wrong: a text differs; says from where on.
    """
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            same = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            raise Wrong(f"text {number + 1} of {len(found)} differs from {what} after {same} characters")


def near(session: lowmem.Session, case: Case, action: str) -> None:
    """
    Raises:
        Wrong: logits are farther from the original's than `action`'s rounding explains.
    """
    model = session._loaded.model  # type: ignore[union-attr]
    worst = 0.0
    for prompt, expected in zip(case.reference.prompts, case.reference.logits, strict=True):
        with torch.inference_mode():
            found = model(input_ids=_ids(prompt)).logits[0].float()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    if not worst < FARTHEST[action]:
        raise Wrong(f"logits are {worst:.0%} off")


def same_bytes(predicted: int, held: int, what: str) -> None:
    """
    Raises:
        Wrong: the numbers differ.
    """
    if predicted != held:
        raise Wrong(f"{what}: {predicted:,} bytes predicted, {held:,} held")


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a loaded model: parameters, the buffers of checkpoints and the codes of our own layers."""
    saved = model.state_dict(keep_vars=True).values()
    ours = [module for module in model.modules() if type(module).__module__.startswith("lowmem")]
    codes = [buffer for module in ours for buffer in module.buffers(recurse=False)]
    packed = sum(
        layouts.int8_bytes(layer.out_features, layer.in_features) for layer in ours if isinstance(layer, Int8Linear)
    )
    return packed + storage_bytes([*(tensor for tensor in saved if isinstance(tensor, torch.Tensor)), *codes])


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def cache_bytes(session: lowmem.Session, prompt: str, options: lowmem.GenerateOptions) -> int:
    """Bytes of keys, values and states that a generation holds. Positions and masks are not among them."""
    model, latest = session._loaded.model, list[Any]()  # type: ignore[union-attr]

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        latest[:] = [value for value in kwargs.values() if isinstance(value, transformers.Cache)]

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        answer(session, prompt, options)
    finally:
        hook.remove()
    found = [tensor for tensor in _tensors(latest, set()) if tensor.dtype not in (torch.int64, torch.bool)]
    return storage_bytes(found)


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor below a cache: in its lists, dicts and layers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), seen)
    elif isinstance(value, DequantizeBuffers):
        return  # one layer's worth, shared by all, and predicted as scratch
    elif type(value).__module__.startswith(("lowmem.generate", "transformers.cache")) and id(value) not in seen:
        seen.add(id(value))
        slots = [getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        yield from _tensors([*getattr(value, "__dict__", {}).values(), *slots], seen)


# The actions. Each raises `Wrong`, or the `LowMemError` of a refusal.


def plan(case: Case) -> None:
    """Weights and cache take exactly the predicted bytes."""
    session = case.session
    assert session.plan is not None
    same_bytes(session.plan.main.share("weights"), held_bytes(session._loaded.model), "weights")  # type: ignore[union-attr]
    held = cache_bytes(session, case.reference.prompts[0], GREEDY)
    same_bytes(session.estimate(LENGTHS[0], GREEDY).main.share("kv"), held, "cache")


def greedy(case: Case) -> None:
    """Every prompt alone is continued as transformers continues it."""
    session = case.session
    equal([answer(session, prompt) for prompt in case.reference.prompts], case.reference.texts, "transformers'")


def batch(case: Case) -> None:
    """Prompts of three lengths at once are answered as alone, before and after."""
    session, prompts = case.session, case.reference.prompts
    alone = [answer(session, prompt) for prompt in prompts]
    events = session.batch(prompts, GREEDY, raw=True, batch_size=len(prompts))
    together = {event.index: event.text for event in events if isinstance(event, lowmem.Completion)}
    equal([together[number] for number in range(len(prompts))], alone, "the prompt alone")
    equal([answer(session, prompts[0])], alone[:1], "the text before the batch")


def int8(case: Case) -> None:
    """Loaded in int8: every matrix, experts included, takes its predicted bytes, and logits stay near."""
    session = case.loaded(case.folder, precision="int8")
    near(session, case, "int8")
    assert session.plan is not None
    same_bytes(session.plan.main.share("weights"), held_bytes(session._loaded.model), "weights")  # type: ignore[union-attr]


def quantized(case: Case, method: str, **options: Any) -> None:
    out = case.root / method
    request = lowmem.QuantizeRequest.validated(
        str(case.folder), method, {"group_size": 32, **options}, CALIBRATION, out=out
    )
    for _ in lowmem.quantize(request):
        pass
    session = case.loaded(out, precision="auto")
    near(session, case, method)
    answer(session, case.reference.prompts[0])


def rtn(case: Case) -> None:
    """Rounded to 8 bits in a folder of its own, read back, near the original."""
    quantized(case, "rtn", bits=8)


def gptq(case: Case) -> None:
    """The same with GPTQ in 4 bits."""
    quantized(case, "gptq", bits=4)


def awq(case: Case) -> None:
    """The same with AWQ in 4 bits."""
    quantized(case, "awq", bits=4)


def offload(case: Case) -> None:
    """With all blocks read from disk for every token, texts are those of the resident model."""
    resident, prompt = case.session, case.reference.prompts[0]
    expected = answer(resident, prompt)
    session = lowmem.Session()
    layers = lowmem.read_spec(str(case.folder)).layers
    placed = plan_for(
        session, str(case.folder), GOAL, placement=BlockPlacement(disk=tuple(range(layers)), may_map=False)
    )
    equal([_joined(run(session, placed, [prompt], GREEDY, raw=True))], [expected], "the resident model's")
    if not session.streamed_bytes:
        raise Wrong("nothing was read while generating")


def window(case: Case) -> None:
    """A window that holds everything changes nothing; a narrow one does not depend on how the prompt is cut."""
    session, prompt = case.session, case.reference.prompts[1]
    expected = answer(session, prompt)
    equal([answer(session, prompt, replace(GREEDY, window=128))], [expected], "the text without a window")
    narrow = replace(GREEDY, window=32, sinks=4, max_new_tokens=60, unbounded=True)
    whole = answer(session, prompt, narrow)
    equal([answer(session, prompt, replace(narrow, prefill_chunk=16))], [whole], "the prompt in one piece")


def packed(case: Case) -> None:
    """A cache in int8 holds its predicted bytes and begins the text as the exact cache does."""
    session, prompt = case.session, case.reference.prompts[1] * 4
    options = replace(GREEDY, cache_type="int8")
    tokens = len(prompt)
    same_bytes(session.estimate(tokens, options).main.share("kv"), cache_bytes(session, prompt, options), "cache")
    exact, ours = (answer(session, prompt, replace(kind, max_new_tokens=4)) for kind in (GREEDY, options))
    equal([ours], [exact], "the exact cache's")


def export(case: Case) -> None:
    """An ONNX graph in fp32, run by ONNX Runtime, continues prompts as transformers does."""
    out = case.root / "graph"
    request = lowmem.ExportRequest(str(case.folder), out, lowmem.ExportOptions(precision="fp32"))
    for _ in lowmem.export_model(request):
        pass
    session = case.loaded(out, backend="onnx", precision="auto")
    equal([answer(session, prompt) for prompt in case.reference.prompts], case.reference.texts, "transformers'")


ACTIONS: dict[str, Callable[[Case], None]] = {
    action.__name__: action for action in (plan, greedy, batch, int8, rtn, gptq, awq, offload, window, packed, export)
}


def outcome(case: Case, action: str) -> str:
    """The cell of the matrix: "ok", "refused: ...", "WRONG: ..." or "CRASH: ..."."""
    bandwidth.SECONDS = bandwidth.PROBE_SECONDS = 0.01  # speeds are not what is tested
    try:
        ACTIONS[action](case)
    except Incomparable as error:
        return matrix.CANNOT + str(error)
    except CorruptModel as error:
        return f"WRONG: called corrupt: {error}"
    except lowmem.LowMemError as error:
        return f"refused: {error}"
    except Wrong as error:
        return f"WRONG: {error}"
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {first_line(error)} ({_place(error)})"
    return "ok"


def _place(error: BaseException) -> str:
    """File and line of lowmem where an exception passed last."""
    trace, found = error.__traceback__, "?"
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/lowmem/" in name:
            found = f"{name.rpartition('/lowmem/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
