"""Tokens to text: characters over several tokens, stop strings over several pieces, streams and how they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import CONTEXT, EOS, TURN, fresh, prompt, tokenizer, toy
from transformers import PreTrainedTokenizerFast

from lowmem.errors import BadInput, Cancelled
from lowmem.events import CancelToken, Chunk, Step
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.generate.text import Detokenizer, SequenceText, StopStrings, eos_ids, stream

GREEDY = GenerateOptions(max_new_tokens=24, greedy=True)
TEXT = "Grüße! 🙂👩‍👩‍👧 日本語 end"


def pieces(text: str, prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer(), prompt_ids)
    return [detokenizer.push(token) for token in tokenizer()(text)["input_ids"]]


def test_characters_come_whole() -> None:
    parts = pieces(TEXT)
    assert len(parts) == len(TEXT.encode())
    assert "".join(parts) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert "🙂" in parts


def test_a_character_that_is_never_completed_is_left_out() -> None:
    detokenizer = Detokenizer(tokenizer())
    ids = tokenizer()("ab🙂")["input_ids"][:-1]
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == "ab"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    detokenizer = Detokenizer(tokenizer())
    text = "".join(detokenizer.push(token) for token in [0x80] * 30 + [ord("z")])
    assert text.endswith("z")


def test_special_tokens_are_not_shown() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert "".join(detokenizer.push(token) for token in [TURN, ord("a"), EOS, ord("b"), TURN]) == "ab"


def _sentencepiece() -> PreTrainedTokenizerFast:
    """Word pieces that carry their leading space as "▁", which a decoder strips at the beginning of a text."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁The", "▁cat", "s", "▁sat", "▁", "x"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_leading_spaces_survive_behind_the_prompt_and_in_the_middle() -> None:
    detokenizer = Detokenizer(_sentencepiece(), [1])
    assert [detokenizer.push(token) for token in (2, 3, 4)] == [" cat", "s", " sat"]
    assert [Detokenizer(_sentencepiece()).push(1)] == ["The"]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_cut_before_themselves_wherever_the_pieces_end(size: int) -> None:
    text = "one two <stop> three END"
    stops = StopStrings(["END", "<stop>", ""])
    shown = "".join(stops.push(text[i : i + size]) for i in range(0, len(text), size))
    assert shown + stops.flush() == "one two "
    assert stops.found


def test_a_false_beginning_is_shown_once_it_is_known_to_be_one() -> None:
    stops = StopStrings(["\nUser:", "ababc"])
    assert [stops.push(part) for part in ("hi\n", "Us", "ual", " abab", "ab", "c", "more")] == [
        "hi",
        "",
        "\nUsual",
        " ",
        "ab",
        "",
        "",
    ]
    assert stops.found


def test_text_held_back_in_vain_comes_at_the_end() -> None:
    stops = StopStrings(["STOP"])
    assert [stops.push("a ST"), stops.flush(), stops.flush()] == ["a ", "ST", ""]
    assert not stops.found


def _answer(stops: tuple[str, ...] = (), limit: int = 100) -> SequenceText:
    return SequenceText(tokenizer(), [], stops, frozenset({EOS}), limit)


def _push(answer: SequenceText, text: str, more: Sequence[int] = ()) -> str:
    return "".join(answer.push(token) for token in [*tokenizer()(text)["input_ids"], *more])


def test_an_answer_knows_why_it_is_over() -> None:
    ended = _answer(("##",))
    assert (_push(ended, "a #", [EOS]), ended.finish, ended.tokens) == ("a #", "eos", 4)
    stopped = _answer(("##",))
    assert (_push(stopped, "a ##"), stopped.finish) == ("a ", "stop")
    full = _answer(("##",), limit=3)
    assert (_push(full, "a #"), full.finish) == ("a #", "length")
    going = _answer()
    assert (_push(going, "a"), going.finish) == ("a", None)
    assert (going.end("cancelled"), going.finish) == ("", "cancelled")


def run(model: Any, ids: Sequence[int], options: GenerateOptions, context: int = CONTEXT) -> list[Step | Chunk]:
    return list(stream(model, tokenizer(), ids, options, context=context, cancel=CancelToken()))


def texts(events: Sequence[Step | Chunk], count: int = 1) -> list[str]:
    return ["".join(e.text for e in events if isinstance(e, Chunk) and e.index == i) for i in range(count)]


def decoded(ids: Sequence[int], options: GenerateOptions) -> str:
    events = decode(toy("llama"), [ids], options, eos_ids=frozenset({EOS}), cancel=CancelToken())
    tokens = [event.ids[0] for event in events if isinstance(event, Tokens)]
    return tokenizer().decode(tokens, skip_special_tokens=True)


def ascii_toy() -> Any:
    """A toy that writes printable characters only."""
    model = fresh("llama")
    others = torch.tensor([token for token in range(260) if not 32 <= token < 127])
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, others, float("-inf")))
    return model


def test_the_stream_is_the_decoded_text_with_the_figures_of_the_run() -> None:
    events = run(ascii_toy(), prompt(30), GREEDY)
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert len(chunks) == 24
    assert all(len(chunk.text) == 1 for chunk in chunks)
    last = chunks[-1]
    assert [chunk.finish for chunk in chunks] == [None] * 23 + ["length"]
    assert (last.prompt_tokens, last.new_tokens, last.context_limit, last.context_tokens) == (30, 24, CONTEXT, 54)
    assert last.seconds_to_first > 0
    assert last.prefill_tps == pytest.approx(30 / last.seconds_to_first)
    assert last.decode_tps > 0
    assert isinstance(events[0], Step)


def test_a_stop_string_ends_one_of_several_answers() -> None:
    model, options = ascii_toy(), GenerateOptions(max_new_tokens=24, seed=2, num_return_sequences=3, temperature=2.0)
    whole = texts(run(model, prompt(8), options), 3)
    stop = whole[1][6:8]
    events = run(model, prompt(8), replace(options, stop=(stop,)))
    for index, (text, full) in enumerate(zip(texts(events, 3), whole, strict=True)):
        assert text == full.split(stop)[0]
        finishes = [event.finish for event in events if isinstance(event, Chunk) and event.index == index]
        assert finishes[-1] == ("stop" if stop in full else "length")
        assert set(finishes[:-1]) <= {None}


def test_answers_are_shortened_to_the_context_and_it_is_said() -> None:
    events = run(ascii_toy(), prompt(30), GREEDY, context=35)
    assert "limited to 5." in events[0].note
    assert len(texts(events)[0]) == 5
    with pytest.raises(BadInput, match="30 tokens, but prompt and answer together may have only 30"):
        run(toy("llama"), prompt(30), GREEDY, context=30)


def _slow_toy(seconds: float) -> Any:
    model = ascii_toy()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def test_stop_before_the_first_token_raises() -> None:
    cancel = CancelToken()
    events = stream(_slow_toy(0.3), tokenizer(), prompt(8), GREEDY, context=CONTEXT, cancel=cancel)
    next(events)
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(Cancelled):
        list(events)


def test_stop_after_it_keeps_the_text_and_ends_every_answer() -> None:
    cancel = CancelToken()
    options = GenerateOptions(max_new_tokens=100, num_return_sequences=2, seed=1)
    chunks = []
    for event in stream(_slow_toy(0.01), tokenizer(), prompt(8), options, context=CONTEXT, cancel=cancel):
        if isinstance(event, Chunk):
            chunks.append(event)
            if event.new_tokens == 3:
                cancel.set()
    assert [chunk.finish for chunk in chunks[-2:]] == ["cancelled", "cancelled"]
    assert {chunk.index for chunk in chunks[-2:]} == {0, 1}
    assert all(len(text) == 3 for text in texts(chunks, 2))


def test_the_ends_of_an_answer_are_those_of_model_and_tokenizer() -> None:
    model = fresh("llama")
    assert eos_ids(model, tokenizer()) == {EOS}
    model.generation_config.eos_token_id = [EOS, TURN]
    assert eos_ids(model, tokenizer()) == {EOS, TURN}
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer()) == {EOS}
