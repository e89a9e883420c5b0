"""Sizes and times, written and read."""

from __future__ import annotations

import pytest

from lowmem.errors import BadInput
from lowmem.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 KB"),
        (538_000_000, "538 MB"),
        (999_600_000, "1.00 GB"),
        (1_234_000_000, "1.23 GB"),
        (9_996_000_000, "10.0 GB"),
        (15_640_000_000, "15.6 GB"),
        (128_000_000_000, "128 GB"),
        (-2_500_000, "-2.50 MB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4G", 4_000_000_000),
        ("4GB", 4_000_000_000),
        ("4Gi", 4 * 2**30),
        ("15GiB", 15 * 2**30),
        ("1.5g", 1_500_000_000),
        (" 512 M ", 512_000_000),
        ("100k", 100_000),
        ("2T", 2 * 10**12),
        ("123", 123),
        ("123B", 123),
        (7.9, 7),
        (42, 42),
    ],
)
def test_parse_bytes(text: str | float, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "four", "-1G", "4X", "1e9", "4 4G", "5i", "1.G"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(BadInput, match="is not a size") as caught:
        parse_bytes(text)
    assert "4G" in caught.value.hint


@pytest.mark.parametrize("count", [1, 999, 12_345, 98_765_432, 4_000_000_000])
def test_what_is_written_can_be_read(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (59.0, "59.0 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
