"""The named texts, a text of one's own, and how much two texts share."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from dataclasses import replace

import fake_hub
import pytest

from lowmem.datasets import hub_texts, texts
from lowmem.datasets.texts import calibration_text, evaluation_text, overlap
from lowmem.errors import BadInput, CorruptModel, Offline


def test_the_manual_is_split_for_calibration_and_evaluation():
    first, last = calibration_text(), evaluation_text()
    assert (first.name, last.name) == ("manual (head)", "manual (tail)")
    assert len(first.text) > 3 * len(last.text)
    assert len(last.text) > 50_000
    assert overlap(last.text, first.text) < 0.01
    assert calibration_text("manual") == first


def test_overlap_is_the_share_of_the_text_that_the_other_holds():
    words = [f"word{number}" for number in range(260)]
    whole, half = " ".join(words), " ".join(words[:130])
    assert overlap(whole, whole) == 1.0
    assert overlap(half, "before " + whole) == 1.0
    assert overlap(whole, half) == pytest.approx(0.5)
    assert overlap(whole, "something else entirely, and long enough to be compared with the other one") == 0.0
    assert overlap("", whole) == 0.0


def test_a_file_of_ones_own_is_used_whole(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffGrüße aus dem Leuchtturm.".encode())
    assert evaluation_text(file) == calibration_text(str(file))
    assert evaluation_text(file).text == "Grüße aus dem Leuchtturm."
    assert evaluation_text(file).name == "mine.txt"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no text"),
        (b" \n ", "no text"),
        (b"a\0b", "binary"),
        (b"abc\xff\xfe", "not UTF-8 text .byte 3"),
        (None, "no file"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path, content, words):
    file = tmp_path / "input.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=words) as caught:
        evaluation_text(file)
    assert caught.value.hint


def test_a_folder_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInput):
        evaluation_text(tmp_path)
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 10)
    (tmp_path / "huge.txt").write_text("more than ten bytes")
    with pytest.raises(BadInput, match="19 B, more than the 10 B"):
        evaluation_text(tmp_path / "huge.txt")


def test_wikitext_without_a_hub_names_what_can_be_used_instead():
    with pytest.raises(Offline, match="WikiText-2 has not been downloaded") as caught:
        evaluation_text("wikitext2")
    assert "'manual'" in caught.value.hint


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as files:
        files.writestr("wikitext-2-raw/wiki.train.raw", " = Training = \n")
        files.writestr("wikitext-2-raw/wiki.test.raw", " = Robert Boulter = \n")
    return out.getvalue()


@pytest.fixture
def hub(monkeypatch, online):
    with fake_hub.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        for name, source in hub_texts.TEXTS.items():
            monkeypatch.setitem(hub_texts.TEXTS, name, replace(source, commit=fake_hub.COMMIT))
        yield server


def test_wikitext_is_fetched_once(hub, monkeypatch):
    data = archive()
    hub.add("datasets/ggml-org/ci", {"wikitext-2-raw-v1.zip": data})
    monkeypatch.setattr(hub_texts, "_WIKITEXT_SHA256", hashlib.sha256(data).hexdigest())
    assert evaluation_text("wikitext2").text == " = Robert Boulter = \n"
    assert calibration_text("wikitext2").text == " = Training = \n"
    assert calibration_text("wikitext2").name == "wikitext2 (train)"
    assert calibration_text("wikitext2") == calibration_text("wikitext2")
    assert len(hub.requests) == 2


def test_a_damaged_or_missing_wikitext(hub):
    with pytest.raises(Offline, match="hub refused"):
        evaluation_text("wikitext2")
    hub.add("datasets/ggml-org/ci", {"wikitext-2-raw-v1.zip": archive()[:-1]})
    with pytest.raises(CorruptModel, match="damaged"):
        evaluation_text("wikitext2")


def c4(*texts: str) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode())


def test_of_c4_the_beginning_is_read(hub, monkeypatch):
    monkeypatch.setattr(hub_texts, "C4_CHARACTERS", 14)
    files = {"en/c4-train.00000-of-01024.json.gz": c4("One page.", "Another.", "A third.")}
    hub.add("datasets/allenai/c4", files | {"en/c4-validation.00000-of-00008.json.gz": c4("Held out.")})
    assert calibration_text("c4") == texts.Text("c4 (train)", "One page.\n\nAno")
    assert evaluation_text("c4").text == "Held out."


# By name: gzip writes the time into its data, and two processes must call a test the same.
@pytest.mark.parametrize(
    "data", [b"not gzip", gzip.compress(b"not json\n"), gzip.compress(b"")], ids=["not gzip", "not json", "empty"]
)
def test_a_damaged_c4(hub, data):
    hub.add("datasets/allenai/c4", {"en/c4-train.00000-of-01024.json.gz": data})
    with pytest.raises(CorruptModel, match="C4 is damaged"):
        calibration_text("c4")
