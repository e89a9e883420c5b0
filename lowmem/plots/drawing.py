"""Shapes on a sheet, written as SVG or painted as PNG; knows nothing of what they show.

No font file and no style sheet is needed: the SVG names generic families only, and Pillow brings a
font. The sheet is transparent, and the neutral grey has the same contrast on white and on black.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from html import escape
from typing import Any

GREY = "#7a7a7a"
FAINT = "#7a7a7a55"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

_PNG_SCALE = 2
_SMOOTHING = 2
"""A PNG is painted so many times larger still and scaled down, which smooths its edges."""

_ANCHORS = {"start": "l", "middle": "m", "end": "r"}


@dataclass(frozen=True, slots=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    color: str


@dataclass(frozen=True, slots=True)
class Line:
    x: float
    y: float
    to_x: float
    to_y: float
    color: str = FAINT
    width: float = 1


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    radius: float
    color: str


@dataclass(frozen=True, slots=True)
class Label:
    """Text whose middle line is at `y`; `anchor` says which of its ends is at `x`."""

    x: float
    y: float
    text: str
    size: float = 13
    anchor: str = "start"
    color: str = GREY
    bold: bool = False


Shape = Bar | Line | Dot | Label


@dataclass(frozen=True, slots=True)
class Sheet:
    """Shapes in the order they are painted, on a sheet of so many pixels."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    title: str = ""


def to_svg(sheet: Sheet) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {sheet.width} {sheet.height}" role="img" font-family="{FONT}">',
        f"<title>{escape(sheet.title)}</title>",
        *map(_element, sheet.shapes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _element(shape: Shape) -> str:
    match shape:
        case Bar(x, y, width, height, color):
            return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{color}"/>'
        case Line(x, y, to_x, to_y, color, width):
            return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{color}" stroke-width="{width:g}"/>'
        case Dot(x, y, radius, color):
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'
        case Label(x, y, text, size, anchor, color, bold):
            weight = ' font-weight="600"' if bold else ""
            place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"'
            return f'<text {place} font-size="{size:g}" fill="{color}"{weight}>{escape(text)}</text>'


def to_png(sheet: Sheet) -> bytes:
    """The same as a PNG of twice as many pixels each way."""
    from PIL import Image, ImageDraw

    scale = _PNG_SCALE * _SMOOTHING
    image = Image.new("RGBA", (sheet.width * scale, sheet.height * scale), "#7a7a7a00")
    brush = ImageDraw.Draw(image)
    for shape in sheet.shapes:
        _paint(brush, shape, scale)
    out = io.BytesIO()
    image.resize((sheet.width * _PNG_SCALE, sheet.height * _PNG_SCALE), Image.Resampling.LANCZOS).save(
        out, "PNG", optimize=True
    )
    return out.getvalue()


def _paint(brush: Any, shape: Shape, scale: int) -> None:
    from PIL import ImageFont

    match shape:
        case Bar(x, y, width, height, color):
            corners = (x * scale, y * scale, (x + width) * scale, (y + height) * scale)
            brush.rounded_rectangle(corners, 2 * scale, fill=color)
        case Line(x, y, to_x, to_y, color, width):
            brush.line(
                (x * scale, y * scale, to_x * scale, to_y * scale), fill=color, width=max(1, round(width * scale))
            )
        case Dot(x, y, radius, color):
            brush.circle((x * scale, y * scale), radius * scale, fill=color)
        case Label(x, y, text, size, anchor, color, bold):
            font = ImageFont.load_default(size * scale)
            brush.text(
                (x * scale, y * scale),
                text,
                fill=color,
                font=font,
                anchor=_ANCHORS[anchor] + "m",
                stroke_width=scale // 4 if bold else 0,
            )
