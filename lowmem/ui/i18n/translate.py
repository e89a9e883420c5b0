"""English sentences in another language. Knows catalogues and text, nothing of the page.

The source speaks English. A catalogue maps templates of its sentences to templates of another language, with `{}`
where the source fills something in ("Groups of {} do not divide the {} inputs of {}."). A finished sentence is matched
against them, the one with most words of its own first, and what was filled in is translated in turn.
"""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from string import Formatter

SOURCE = "en"
FOLDER = Path(__file__).parent / "translations"
ABOUT = "language.toml"

LONGEST = 2_000  # characters of a sentence that is looked up
FEW_LETTERS = 6  # of a template: it says so little that what it is filled with must be known, too

_UNIT = r"(?:[KMGT]?B|[%xX]|ms|min|s|h|tok|tokens)"
_FIGURES = re.compile(rf"(?=.*\d)(?:[^A-Za-zÀ-ɏ]|(?<![A-Za-z]){_UNIT}(?![A-Za-z]))+", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![.,]?\d)|(?<![\w.,])\d+\.\d+(?![.,]?\d)")
_HOLE = rf"([+-]?\d[\d,]*(?:\.\d+)?(?: ?{_UNIT}(?![A-Za-z]))?|.*?)"
_SENTENCES = re.compile(r"(?<=[.!?])( )(?=[A-ZÀ-Þ0-9'\"])")
_NEXT_SENTENCE = re.compile(r" [A-ZÀ-Þ]")
_SEPARATORS = (
    re.compile(r"( · )"),
    _SENTENCES,
    re.compile(r"(; )"),
    re.compile(r"(: )"),
    re.compile(r"(, )(?![^(]*\))"),
)
_SIZE = r"[+-]?\d[\d.,]*(?: [KMG]?B)?"
_BESIDE_A_SIZE = (re.compile(rf"(.*\D)( )({_SIZE})"), re.compile(rf"({_SIZE})( )(\D.*)"))


TAG = re.compile(r"(<[^>]*>)")
_NAME = re.compile(r"<(/?)([\w-]+)")
SPOKEN = re.compile(r'(?<= )(aria-label|title|data-tip|alt|placeholder)="([^"]*)"')
_SILENT = ("style", "script", "code", "pre")


@dataclass(frozen=True, slots=True)
class Template:
    """A sentence with holes.

    Args:
        pattern: finds what fills them.
        words: its own text, piece by piece.
        target: the sentence in the other language.
    """

    pattern: re.Pattern[str]
    words: tuple[str, ...]
    target: str

    def fillings(self, text: str) -> tuple[str, ...] | None:
        """What fills the holes; each takes whole sentences or stays within one."""
        match = self.pattern.fullmatch(text) if all(word in text for word in self.words) else None
        whole = match and all(_is_whole(match, number) for number in range(1, len(match.groups()) + 1))
        return match.groups() if match and whole else None

    @property
    def letters(self) -> int:
        return sum(character.isalpha() for word in self.words for character in word)


def _is_whole(match: re.Match[str], number: int) -> bool:
    before, after = match.string[: match.start(number)], match.string[match.end(number) :]
    if not _SENTENCES.search(match[number]) or before.endswith((". ", ": ")):
        return True
    return not before and _NEXT_SENTENCE.match(after) is not None


class Catalogue:
    """The sentences of one language.

    Args:
        entries: English template to the language's own.
        decimal, thousands: how its numbers are written.
    """

    def __init__(self, entries: dict[str, str], decimal: str = ".", thousands: str = ",") -> None:
        self._signs = str.maketrans({".": decimal, ",": thousands})
        self._phrases = {filled(source): filled(target) for source, target in entries.items() if not holes(source)}
        templates = (_template(source, target) for source, target in entries.items() if holes(source))
        self._templates = sorted(templates, key=lambda one: (-one.letters, len(one.words)))

    def find(self, text: str) -> str | None:
        """The sentence in this language, None when nothing is known of it."""
        if text in self._phrases:
            return self._phrases[text]
        if len(text) > LONGEST or not text:
            return None
        if _FIGURES.fullmatch(text):
            return _NUMBER.sub(lambda number: number[0].translate(self._signs), text)
        return self._matched(text) or self._split(text)

    def _matched(self, text: str) -> str | None:
        for template in self._templates:
            if (fillings := template.fillings(text)) is not None:
                parts = [(part, self.find(part.strip())) for part in fillings]
                if template.letters >= FEW_LETTERS or all(
                    known is not None or " " not in part for part, known in parts
                ):
                    return template.target.format(*(part if known is None else known for part, known in parts))
        return None

    def _split(self, text: str) -> str | None:
        """Sentences and items that stand in a row, each by itself; a word and its number."""
        rows = [separator.split(text) for separator in _SEPARATORS]
        rows += [list(match.groups()) for pattern in _BESIDE_A_SIZE if (match := pattern.fullmatch(text))]
        for row in rows:
            if len(row) > 1:
                row[::2] = [self.find(part) or part for part in row[::2]]
                if (joined := "".join(row)) != text:
                    return joined
        return None


def _template(source: str, target: str) -> Template:
    words = [filled(literal) for literal in _literals(source)]
    return Template(re.compile(_HOLE.join(map(re.escape, words)), re.DOTALL), tuple(filter(None, words)), target)


def _literals(template: str) -> Iterator[str]:
    """The texts between the holes, one more than there are holes; braces stay doubled."""
    pieces, literal = list(Formatter().parse(template)), ""
    for text, name, *_ in pieces:
        literal += text.replace("{", "{{").replace("}", "}}")
        if name is not None:
            yield literal
            literal = ""
    yield literal


def holes(template: str) -> int:
    """
    >>> holes("{} of {}")
    2
    """
    return sum(name is not None for _, name, *_ in Formatter().parse(template))


def filled(template: str) -> str:
    """A template without holes as the text that it is."""
    return template.replace("{{", "{").replace("}}", "}")


def languages() -> tuple[str, ...]:
    """Keys of all languages, English first."""
    return (SOURCE, *sorted(folder.name for folder in FOLDER.iterdir() if (folder / ABOUT).is_file()))


@cache
def about(language: str) -> dict[str, str]:
    """`tag` (BCP 47), `decimal` and `thousands` of a language."""
    if language == SOURCE:
        return {"tag": SOURCE, "decimal": ".", "thousands": ","}
    return tomllib.loads((FOLDER / language / ABOUT).read_text(encoding="utf-8"))


def entries(language: str) -> Iterator[tuple[str, str, str]]:
    """(file, English template, template of the language) of all that is translated."""
    for file in sorted((FOLDER / language).glob("*.toml")):
        if file.name != ABOUT:
            yield from ((file.stem, *pair) for pair in tomllib.loads(file.read_text(encoding="utf-8")).items())


@cache
def catalogue(language: str) -> Catalogue:
    told = about(language)
    return Catalogue({source: target for _, source, target in entries(language)}, told["decimal"], told["thousands"])


@lru_cache(maxsize=16_384)
def translate(text: str, language: str) -> str:
    """`text` in `language`; as it is where it is English already or nothing is known of it."""
    if language == SOURCE:
        return text
    bare = text.strip()
    found = catalogue(language).find(bare)
    return text if found is None else text.replace(bare, found, 1) if bare else text


def preferred(accept: str, known: Iterable[str] | None = None) -> str:
    """The language of a browser's Accept-Language header, English where none of its wishes is known.

    >>> preferred("de;q=0.5, pt-BR, pt;q=0.9, en;q=0.8", ["en", "pt"])
    'pt'
    """
    wishes = []
    for wish in accept.lower().split(","):
        name, _, weight = wish.strip().partition(";q=")
        wishes.append((-_weight(weight), name.partition("-")[0]))
    keys = languages() if known is None else tuple(known)
    return next((name for weight, name in sorted(wishes, key=lambda wish: wish[0]) if weight and name in keys), SOURCE)


def _weight(text: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        return 0.0


def translate_html(source: str, language: str) -> str:
    """HTML with its texts and spoken attributes in `language`; an element that says it is English says what it is now."""
    if language == SOURCE:
        return source
    out, quiet = [], ""  # quiet: the tag whose end is awaited
    depth = 0
    for piece in TAG.split(source):
        tag = _NAME.match(piece)
        if tag and quiet:
            depth += 0 if tag[2] != quiet or piece.endswith("/>") else -1 if tag[1] else 1
            quiet = quiet if depth else ""
        elif tag:
            out.append(_translated_tag(piece, language))
            if not tag[1] and not piece.endswith("/>") and ('translate="no"' in piece or tag[2] in _SILENT):
                quiet, depth = tag[2], 1
            continue
        elif not quiet and piece.strip():
            out.append(html.escape(translate(html.unescape(piece), language), quote=False))
            continue
        out.append(piece)
    return "".join(out)


def _translated_tag(tag: str, language: str) -> str:
    tag = SPOKEN.sub(lambda found: f'{found[1]}="{html.escape(translate(html.unescape(found[2]), language))}"', tag)
    return tag.replace(f' lang="{SOURCE}"', f' lang="{about(language)["tag"]}"')
