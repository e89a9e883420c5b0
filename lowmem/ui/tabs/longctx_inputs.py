"""Inputs shared by the modes of the Long Context tab: text, window and options."""

from __future__ import annotations

from typing import Any, Protocol

from lowmem.generate.options import GenerateOptions


class Inputs(Protocol):
    """The controls that all modes share.

    Attributes:
        options: controls whose values `read` takes.
    """

    window: Any
    stride: Any
    options: list[Any]

    @property
    def source(self) -> list[Any]:
        """The controls whose values are the fields of a `TextSource`."""

    def read(self, *values: Any) -> GenerateOptions:
        """The values of `options`, validated."""
