"""Prompts from text and files, within limits; results to files, written atomically."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from lowmem.errors import BadInput
from lowmem.events import Completion
from lowmem.measure.rows import write_atomically
from lowmem.messages import msg, translate
from lowmem.ui.service.results import new_folder
from lowmem.units import MB, format_bytes

FILE_LIMIT = 2 * MB
PROMPT_LIMIT = 1000
COLUMNS = ("prompt", "text", "input", "question")


def gather(lines: str, file: str | None) -> list[str]:
    """The prompts of the text box and the file together, blank ones left out.

    Raises:
        BadInput: none, too many, a file that is too big or cannot be read.
    """
    prompts = [line.strip() for line in lines.splitlines()]
    if file:
        prompts += read_file(Path(file))
    return checked(prompts)


def checked(prompts: Sequence[str]) -> list[str]:
    """The prompts that are not blank, 1 to `PROMPT_LIMIT` of them."""
    filled = [prompt for prompt in prompts if prompt.strip()]
    if not filled:
        raise BadInput(msg("There are no prompts."), msg("Write one per line, or upload a .txt, .csv or .jsonl file."))
    if len(filled) > PROMPT_LIMIT:
        raise BadInput(
            msg(
                "{count:,} prompts are more than the {prompt_limit:,} allowed in one batch.",
                count=len(filled),
                prompt_limit=PROMPT_LIMIT,
            ),
            msg("Split them."),
        )
    return filled


def read_file(path: Path) -> list[str]:
    """Prompts of a .txt (one per line), .csv (column "prompt", else the first) or .jsonl file."""
    size = path.stat().st_size
    if size > FILE_LIMIT:
        raise BadInput(
            msg(
                "{path} is {size}, more than the {file_limit} allowed.",
                path=path.name,
                size=format_bytes(size),
                file_limit=format_bytes(FILE_LIMIT),
            ),
            msg("Split the file."),
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(msg("{path} is not UTF-8 text.", path=path.name), msg("Save it as UTF-8.")) from None
    readers: dict[str, Callable[[str], list[str]]] = {".txt": str.splitlines, ".csv": _from_csv, ".jsonl": _from_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInput(
            msg("{path} is not a .txt, .csv or .jsonl file.", path=path.name), msg("Save the prompts as one of these.")
        )
    return reader(text)


def _from_csv(text: str) -> list[str]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise BadInput(msg("The table cannot be read: {error}.", error=error), msg("Save it as CSV.")) from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in COLUMNS if name in header), None)
    if column is None:
        return [row[0] for row in rows]
    return [row[column] for row in rows[1:] if len(row) > column]


def _from_jsonl(text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise BadInput(
                msg("Line {number} is not JSON.", number=number), msg('Write each as {"prompt": "..."} or "...".')
            ) from None
        prompt = next((value[name] for name in COLUMNS if name in value), None) if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise BadInput(
                msg("Line {number} has no prompt.", number=number), msg('Write each as {"prompt": "..."} or "...".')
            )
        prompts.append(prompt)
    return prompts


def write_results(rows: Sequence[Completion]) -> tuple[Path, Path]:
    """results.csv and results.jsonl in a folder of their own; neither appears half written."""
    folder = new_folder("batch")
    records = [asdict(row) for row in sorted(rows, key=lambda row: (row.index, row.sequence))]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(records[0]) if records else ["prompt", "text"])
    writer.writeheader()
    writer.writerows(records)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    csv_path = write_atomically(folder / "results.csv", table.getvalue())
    return csv_path, write_atomically(folder / "results.jsonl", lines)


def joined(texts: dict[int, str]) -> str:
    """One sequence as it is; several under numbered headings in the visitor's language."""
    if len(texts) <= 1:
        return "".join(texts.values())
    return "\n\n".join(
        f"— {translate(msg('Answer {number}', number=index + 1))} —\n{texts[index]}" for index in sorted(texts)
    )
