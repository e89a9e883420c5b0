"""Long texts piece by piece against the whole: the same ids, by tokenizers of every kind."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import pytest
import toys
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowmem.generate import tokens
from lowmem.generate.tokens import token_ids, with_special

MANUAL = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
TEXT = (
    MANUAL[:40_000] + "\n\nÀ la carte: 漢字かな交じり文, ünïcödé and 123456 numbers.\t\n" * 60 + MANUAL[40_000:60_000]
)


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2 and SmolLM: words with the space in front, offsets without it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As of Llama 2: spaces are letters, one is put in front of every text, and merges run over the whole of it."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^▁\n]*[▁\n]"), "isolated")
    core.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>"]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("never in a text"), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": toys.tokenizer,
    "byte level": byte_level,
    "sentence piece": sentence_piece,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [700, 5_000, 32_768])
def test_pieces_give_what_the_whole_gives(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind]()
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    around = tokenizer(TEXT)["input_ids"]
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "OVERLAP", min(512, piece // 10))
    assert token_ids(tokenizer, TEXT) == whole
    assert token_ids(tokenizer, TEXT, 5000) == whole[:5000]
    assert with_special(tokenizer, TEXT) == around


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_is_longer_than_it_may_be(kind: str) -> None:
    tokenizer, seen = KINDS[kind](), list[int]()

    class Watched:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

    assert len(token_ids(Watched(), 3 * TEXT)) > 10_000
    assert len(seen) > 4
    assert max(seen) <= tokens.PIECE + tokens.OVERLAP


def test_a_text_without_words_is_tokenized_whole() -> None:
    text = "x" * 40_000
    assert token_ids(toys.tokenizer(), text) == list(text.encode())
