"""What every mode of the Long Context tab asks of the tab: its text, its window, its options."""

from __future__ import annotations

from typing import Any, Protocol

from lowmem.events import CancelToken
from lowmem.generate.options import GenerateOptions


class Inputs(Protocol):
    """The controls that all modes share, and how their values are read."""

    window: Any
    stride: Any
    options: list[Any]

    @property
    def source(self) -> list[Any]:
        """The controls that say where the text is."""

    def read(self, *values: Any) -> GenerateOptions:
        """The values of `options`, validated."""

    def given(self, text: str, file: str | None, address: str | None, cancel: CancelToken) -> str:
        """The long text that the values of `source` name."""
