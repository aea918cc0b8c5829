"""The rows of a prompt file: JSONL, CSV or plain text, before any rule of a prompt set.

A reader never raises: what it cannot read becomes a `Row` with a problem, so that one pass finds every
mistake of a file. `grpo_engine.prompts` judges the rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

Kind = Literal["jsonl", "txt", "csv"]

KINDS: tuple[Kind, ...] = get_args(Kind)
CORE_KEYS = ("id", "text", "tier", "split")
LISTED = 5  # how many problems, pairs or line numbers a message spells out before "and N more"

# All of Unicode's whitespace, and the byte-order mark that editors leave where files were joined.
_BLANKS = "\ufeff" + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())


@dataclass(frozen=True)
class Row:
    """One record of a file: its fields, or why it has none. A row with neither is an empty line."""

    line: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def blank(self) -> bool:
        return not self.fields and not self.problem


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:  # the end of the last line, not an empty line after it
        lines.pop()
    return lines


def _read_txt(text: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(text), start=1):
        text_of_line = tidy(line)
        yield Row(number, {"text": text_of_line} if text_of_line else {})


def _read_jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(text), start=1):
        yield _read_json_line(number, line) if tidy(line) else Row(number)


def _read_json_line(number: int, line: str) -> Row:
    try:
        value = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        # A lone surrogate ("\ud800") is valid JSON but no text: it could be neither hashed nor saved.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        return Row(number, problem=f"not valid JSON at column {error.colno} ({reason}); correct it.")
    except UnicodeEncodeError:
        return Row(number, problem="holds half of a surrogate pair, which is no character; correct it.")
    except RecursionError:
        return Row(number, problem="is nested too deeply; write a flat JSON object.")
    except ValueError as error:
        return Row(number, problem=f"not valid JSON ({error}); correct it.")
    if not isinstance(value, dict):
        problem = f'is not a JSON object but {shown(value)}; write {{"text": "..."}} on each line.'
        return Row(number, problem=problem)
    # An empty object is a record without text, not an empty line.
    return Row(number, value or {"text": None})


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        record[key] = value
    return record


def _read_csv(text: str) -> Iterator[Row]:
    """Rows of a CSV file under the number of their first line. An unreadable row ends the file."""
    if "\0" in text:  # Python 3.10's reader does not say where
        yield Row(text[: text.index("\0")].count("\n") + 1, problem="the text has a control character, U+0000")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = [tidy(cell) for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(line, problem=f"not valid CSV ({error}); check the quotation marks.")
            return
        while cells and not cells[-1]:  # spreadsheets pad rows to the widest one
            cells.pop()
        if not cells:
            yield Row(line)
        elif header is None:
            header = [cell.lower() if cell.lower() in CORE_KEYS else cell for cell in cells]
            problem = _header_problem(header)
            if problem:
                yield Row(line, problem=problem)
                return
        elif len(cells) > len(header):
            problem = f"has {len(cells)} fields for {len(header)} columns; quote texts that hold a comma."
            yield Row(line, problem=problem)
        else:
            yield Row(line, {key: cell for key, cell in zip(header, cells, strict=False) if cell})


def _header_problem(header: list[str]) -> str:
    """Why a CSV header cannot be used, or an empty string."""
    if "text" not in header:
        columns = ", ".join(shown(column) for column in header[:LISTED])
        return f'no column is named "text" (found: {columns}); name it in a header, between commas.'
    doubled = [column for position, column in enumerate(header) if column in header[:position]]
    if doubled:
        return f"the header names the column {shown(doubled[0])} twice; name each column once."
    return "" if all(header) else "the header leaves a column without a name; name each column."


READERS: dict[Kind, Callable[[str], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "txt": _read_txt,
    "csv": _read_csv,
}


def tidy(text: str) -> str:
    """`text` without the whitespace and byte-order marks at its ends."""
    return text.strip(_BLANKS)


def shown(value: Any) -> str:
    """`value` for a message: on one line, escaped, and short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
