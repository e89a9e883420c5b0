"""The named texts, a text of one's own, and how much two texts share."""

from __future__ import annotations

import hashlib
import io
import zipfile

import fake_hub
import pytest

from lowmem.errors import BadInput, CorruptModel, Offline
from lowmem.measure import texts
from lowmem.measure.texts import head, overlap, tail


def test_the_manual_is_split_for_calibration_and_evaluation():
    first, last = head(), tail()
    assert (first.name, last.name) == ("manual (head)", "manual (tail)")
    assert len(first.text) > 3 * len(last.text)
    assert len(last.text) > 50_000
    assert overlap(last.text, first.text) < 0.01
    assert head("manual") == first


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
    assert tail(file) == head(str(file))
    assert tail(file).text == "Grüße aus dem Leuchtturm."
    assert tail(file).name == "mine.txt"


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
        tail(file)
    assert caught.value.hint


def test_a_folder_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInput):
        tail(tmp_path)
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 10)
    (tmp_path / "huge.txt").write_text("more than ten bytes")
    with pytest.raises(BadInput, match="19 B, more than the 10 B"):
        tail(tmp_path / "huge.txt")


def test_wikitext_without_a_hub_names_what_can_be_used_instead():
    with pytest.raises(Offline, match="WikiText-2 is not here") as caught:
        tail("wikitext2")
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
        monkeypatch.setattr(texts, "_WIKITEXT_COMMIT", fake_hub.COMMIT)
        yield server


def test_wikitext_is_fetched_once(hub, monkeypatch):
    data = archive()
    hub.add("datasets/ggml-org/ci", {"wikitext-2-raw-v1.zip": data})
    monkeypatch.setattr(texts, "_WIKITEXT_SHA256", hashlib.sha256(data).hexdigest())
    assert tail("wikitext2").text == " = Robert Boulter = \n"
    assert head("wikitext2").text == " = Training = \n"
    assert head("wikitext2").name == "wikitext2 (train)"
    assert len(hub.requests) == 1


def test_a_damaged_or_missing_wikitext(hub):
    with pytest.raises(Offline, match="does not give"):
        tail("wikitext2")
    hub.add("datasets/ggml-org/ci", {"wikitext-2-raw-v1.zip": archive()[:-1]})
    with pytest.raises(CorruptModel, match="damaged"):
        tail("wikitext2")
