"""Prompt sets: what the policy is asked to rewrite, with a difficulty tier and a split for each prompt.

A set is a file in one of three formats, chosen by its extension:

- ``.jsonl``: one JSON object a line; ``text`` is required, ``id``, ``tier`` and ``split`` are optional, any
  other key is kept in `Prompt.meta`;
- ``.csv``: comma-separated, UTF-8, a header that names at least ``text``; other columns as in JSONL;
- ``.txt``: one prompt a line, every character of the line belonging to it (there are no comments: a prompt
  may begin with ``#``).

`parse_prompts` is the pure core (bytes in, `PromptSet` out), so a file, an upload and an edited table are
read by the same code. What would make a run meaningless is refused with a `PromptError` that names file and
line: unreadable bytes, a prompt that is missing, too long or doubled, a held-out prompt that is also trained
on. What can be assumed is assumed, and said in `PromptSet.report`. Everything assumed is a function of the
prompt's text, so the same file gives the same set on every machine.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import os
import re
import stat
import threading
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grpo_engine.prompt_rows import CORE_KEYS, KINDS, LISTED, READERS, Kind, Row, shown, tidy

Tier = Literal["basic", "challenging", "complex"]
Split = Literal["train", "validation", "test"]
CHAT_MARKUP = re.compile(r"<\|[^|<>\s]{1,40}\|>")
"""Text that a tokenizer could take for one of its special tokens, such as an end of turn."""

TokenLimit = Callable[[str], tuple[int, int]]
"""Of a text: how many tokens it has, and how many the model reads."""

TIERS: tuple[Tier, ...] = get_args(Tier)
SPLITS: tuple[Split, ...] = get_args(Split)

MAX_CHARS = 500
MAX_PROMPTS = 10_000
MAX_FILE_BYTES = 20 * 1024 * 1024
DEFAULT_TIER: Tier = "basic"

_SPLIT_BOUNDS: tuple[tuple[Split, float], ...] = (("train", 0.7), ("validation", 0.8), ("test", 1.0))
_ID_PATTERN = re.compile(r"\w[\w.-]{0,99}")


class PromptError(ValueError):
    """A prompt set that cannot be used.

    `problems` holds one sentence for each problem, with file and line; the message shows the first few.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        listed = list(problems[:LISTED])
        if len(problems) > LISTED:
            listed.append(f"and {len(problems) - LISTED:,} more")
        super().__init__("\n".join(listed))


@dataclass(frozen=True)
class Prompt:
    """One prompt. `meta` holds every further key of its record; it is read-only by convention.

    `parse_prompts` guarantees that `text` is stripped, printable and within the length limit, and that `id`
    consists of letters, digits, ``.``, ``_`` and ``-``, so that it can stand in a file name.
    """

    id: str
    text: str
    tier: Tier
    split: Split
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        taken = [key for key in self.meta if key in CORE_KEYS]
        if taken:
            raise PromptError(f'prompt {self.id!r}: "{taken[0]}" is a field of its own, not one of meta.')

    def record(self) -> dict[str, Any]:
        """The prompt as one flat JSON object, its four fields first."""
        return {"id": self.id, "text": self.text, "tier": self.tier, "split": self.split, **self.meta}


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, and in `report` what was skipped, assumed or looks doubtful in their file."""

    prompts: tuple[Prompt, ...]
    name: str
    path: Path | None = None
    report: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, name: Split) -> tuple[Prompt, ...]:
        """The prompts of one split, in file order. Raises `PromptError` for a name that is no split."""
        _require_one_of(name, SPLITS, "split")
        return tuple(prompt for prompt in self.prompts if prompt.split == name)

    def tier(self, name: Tier) -> tuple[Prompt, ...]:
        """The prompts of one tier, in file order. Raises `PromptError` for a name that is no tier."""
        _require_one_of(name, TIERS, "tier")
        return tuple(prompt for prompt in self.prompts if prompt.tier == name)

    def counts(self) -> dict[Split, dict[Tier, int]]:
        """How many prompts each split holds of each tier, zeros included."""
        table: dict[Split, dict[Tier, int]] = {split: dict.fromkeys(TIERS, 0) for split in SPLITS}
        for prompt in self.prompts:
            table[prompt.split][prompt.tier] += 1
        return table

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content and its order; name, path and file format do not enter."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps(prompt.record(), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def normalize(text: str) -> str:
    """The form in which two texts count as the same prompt.

    Unicode compatibility form, case folded, whitespace collapsed, trailing punctuation dropped. A text of
    punctuation alone keeps it, so that no two different texts meet in an empty string.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    collapsed = " ".join(folded.split())
    end = len(collapsed)
    while end and (collapsed[end - 1] == " " or unicodedata.category(collapsed[end - 1]).startswith("P")):
        end -= 1
    return collapsed[:end] or collapsed


def load_prompts(
    path: str | os.PathLike[str],
    *,
    max_chars: int = MAX_CHARS,
    max_prompts: int = MAX_PROMPTS,
    token_limit: TokenLimit | None = None,
) -> PromptSet:
    """Read a prompt set from a ``.jsonl``, ``.txt`` or ``.csv`` file (see `parse_prompts`).

    Raises `PromptError` when the file is missing, unreadable, a folder, over `MAX_FILE_BYTES`, of another
    type, or when its content is refused.
    """
    path = Path(path)
    kind = kind_of(path)
    data = _read_bytes(path)
    loaded = parse_prompts(
        data, name=str(path), kind=kind, max_chars=max_chars, max_prompts=max_prompts, token_limit=token_limit
    )
    return dataclasses.replace(loaded, name=path.stem, path=path)


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """The format that a file's extension names. Raises `PromptError` for any other extension."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    for kind in KINDS:
        if suffix == kind:
            return kind
    ending = f'ends in ".{suffix}"' if suffix else "has no extension"
    raise PromptError(f"{path} {ending}; a prompt set is a .jsonl, .txt or .csv file.")


def parse_prompts(
    data: bytes,
    *,
    name: str,
    kind: Kind,
    max_chars: int = MAX_CHARS,
    max_prompts: int = MAX_PROMPTS,
    token_limit: TokenLimit | None = None,
) -> PromptSet:
    """Read a prompt set from the bytes of a file.

    Args:
        data: the file's content, UTF-8, with or without a byte-order mark, any line ending.
        name: what messages and the set call the file.
        kind: the format.
        max_chars: longest text, in characters.
        max_prompts: most prompts in a set.
        token_limit: gives (tokens, limit) of a text; texts of more tokens than their limit are refused.

    Missing ids and splits come from a hash of the normalized text (splits 70/10/20), a missing tier is
    `DEFAULT_TIER`; each assumption is reported. Raises `PromptError` with all problems of the file.
    """
    _require_one_of(kind, KINDS, "kind")
    if len(data) > MAX_FILE_BYTES:
        raise PromptError(f"{name} is larger than {MAX_FILE_BYTES // 1024**2} MB; divide it.")
    rows = READERS[kind](_decode(data, name))
    builder = _Builder(name, max_chars, token_limit)
    seen = 0
    for row in rows:
        seen += not row.blank
        if seen > max_prompts:
            builder.refuse(row.line, f"more than {max_prompts:,} prompts; divide the set.")
            break
        builder.add(row)
    return builder.finish()


def save_prompts(prompt_set: PromptSet, path: str | os.PathLike[str]) -> None:
    """Write a set as JSONL, atomically: the file holds either its old content or all of the new.

    The bytes are read back before they are written, so a set that could not be loaded is never saved. Raises
    `PromptError` when it could not, when `path` does not end in ``.jsonl``, or when writing fails.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise PromptError(f'{path} does not end in ".jsonl", the format in which prompt sets are saved.')
    lines = []
    for prompt in prompt_set.prompts:
        try:
            line = json.dumps(prompt.record(), ensure_ascii=False, allow_nan=False)
            lines.append(line.encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise PromptError(f"prompt {prompt.id!r} cannot be written as JSON: {error}.") from error
    data = b"".join(lines)
    parse_prompts(
        data,
        name=str(path),
        kind="jsonl",
        max_chars=max((len(prompt.text) for prompt in prompt_set.prompts), default=MAX_CHARS),
        max_prompts=max(len(prompt_set), 1),
    )
    _write_atomically(path, data)


class _Builder:
    """Checks rows one by one, against the rules and against those before, and keeps what is to be said."""

    def __init__(self, name: str, max_chars: int, token_limit: TokenLimit | None) -> None:
        self.name = name
        self.max_chars = max_chars
        self.token_limit = token_limit
        self.prompts: list[Prompt] = []
        self.lines: list[int] = []  # of each prompt
        self.problems: list[str] = []
        self.blank_lines: list[int] = []
        # Positions in `prompts` of those that do not name the key.
        self.without: dict[str, list[int]] = {"id": [], "tier": [], "split": []}
        self.line_of_id: dict[str, int] = {}
        self.first_with: dict[str, tuple[int, Split]] = {}  # normalized text -> its line and split

    def refuse(self, line: int, problem: str) -> None:
        self.problems.append(f"{self.name}, line {line}: {problem}")

    def add(self, row: Row) -> None:
        if row.blank:
            self.blank_lines.append(row.line)
        elif row.problem:
            self.refuse(row.line, row.problem)
        else:
            problem = self._add_record(row.line, row.fields)
            if problem:
                self.refuse(row.line, problem)

    def _add_record(self, line: int, fields: Mapping[str, Any]) -> str:
        """Add one prompt, or return why it is refused."""
        values: dict[str, str] = {}  # of the core keys that are given; null and blank count as not given
        for key in CORE_KEYS:
            value = fields.get(key)
            if value is not None and not isinstance(value, str):
                return f'"{key}" must be a string, not {shown(value)}; put it in quotation marks.'
            if value and tidy(value):
                values[key] = tidy(value)
        text = values.get("text", "")
        problem = self._text_problem(text)
        if problem:
            return problem
        same = normalize(text)
        tier = values.get("tier", DEFAULT_TIER).lower()
        split = values.get("split", split_of(same)).lower()
        for key, value, allowed in (("tier", tier, TIERS), ("split", split, SPLITS)):
            if value not in allowed:
                return f"{shown(value)} is no {key}; use {_alternatives(allowed)}."
        prompt = Prompt(
            id=values.get("id") or "p-" + lot("id", same).hex()[:12],
            text=text,
            tier=tier,  # type: ignore[arg-type]  # a member of TIERS, checked above
            split=split,  # type: ignore[arg-type]  # a member of SPLITS, checked above
            meta={key: value for key, value in fields.items() if key not in CORE_KEYS},
        )
        problem = self._conflict(prompt, same, line)
        if problem:
            return problem
        for key, positions in self.without.items():
            if key not in values:
                positions.append(len(self.prompts))
        self.prompts.append(prompt)
        self.lines.append(line)
        return ""

    def _text_problem(self, text: str) -> str:
        # Also a text of zero-width characters alone.
        if all(unicodedata.category(char) in ("Zs", "Cf") for char in text):
            return 'has no text; fill in "text" or delete the line.'
        if len(text) > self.max_chars:
            return f"the text has {len(text):,} characters, the limit is {self.max_chars:,}; shorten it."
        for position, char in enumerate(text, start=1):
            if unicodedata.category(char) in ("Cc", "Zl", "Zp"):
                code = f"U+{ord(char):04X}"
                return f"the text has a control character, {code} at position {position}; remove it."
        if markup := CHAT_MARKUP.search(text):
            return f"the text has {markup[0]!r}, which is markup of a language model's chat; remove it."
        if self.token_limit is not None:
            tokens, limit = self.token_limit(text)
            if tokens > limit:
                return f"the text has {tokens:,} tokens, the model reads at most {limit:,}; shorten it."
        return ""

    def _conflict(self, prompt: Prompt, same: str, line: int) -> str:
        """Why `prompt` cannot stand beside the prompts before it, or an empty string. Registers it."""
        if not _ID_PATTERN.fullmatch(prompt.id):
            return (
                f"the id {shown(prompt.id)} is refused; use at most 100 letters, digits, '.', '_' and '-', "
                "the first neither '.' nor '-'."
            )
        if same in self.first_with:
            earlier, split = self.first_with[same]
            if split == prompt.split:
                return f"{shown(prompt.text)} is the prompt of line {earlier} again; keep one of them."
            return (
                f"{shown(prompt.text)} is in split {prompt.split} and, at line {earlier}, in split {split}; "
                "a held-out prompt must not be trained on, so keep one of them."
            )
        if prompt.id in self.line_of_id:
            earlier = self.line_of_id[prompt.id]
            return f"the id {shown(prompt.id)} is taken by line {earlier}; give each prompt its own."
        self.first_with[same] = (line, prompt.split)
        self.line_of_id[prompt.id] = line
        return ""

    def finish(self) -> PromptSet:
        if self.problems:
            raise PromptError(*self.problems)
        if not self.prompts:
            raise PromptError(f"{self.name} holds no prompts; write at least one.")
        notes = self._assumptions()
        notes += self._train_from_chance()
        present = {prompt.split for prompt in self.prompts}
        notes += [f"{self.name}: no prompt is in split {split}." for split in SPLITS if split not in present]
        notes += self._near_leaks()
        return PromptSet(tuple(self.prompts), name=self.name, report=tuple(notes))

    def _assumptions(self) -> list[str]:
        notes = []
        if self.blank_lines:
            notes.append(f"{self.name}: {_lines_named(self.blank_lines)} empty, skipped.")
        for key, assumed in (
            ("id", "derived from a hash of the text"),
            ("tier", f'taken as "{DEFAULT_TIER}"'),
            ("split", "assigned by a hash of the text, about 70 % train, 10 % validation, 20 % test"),
        ):
            positions = self.without[key]
            if positions:
                named = _lines_named([self.lines[position] for position in positions])
                notes.append(f"{self.name}: {named} without {key}, {assumed}.")
        return notes

    def _train_from_chance(self) -> list[str]:
        """Give train one prompt when the hash gave it none, as it may in a set of a few prompts."""
        unassigned = self.without["split"]
        if not unassigned or any(prompt.split == "train" for prompt in self.prompts):
            return []
        chosen = min(unassigned, key=lambda position: lot("split", normalize(self.prompts[position].text)))
        self.prompts[chosen] = dataclasses.replace(self.prompts[chosen], split="train")
        line = self.lines[chosen]
        return [f"{self.name}, line {line}: moved to split train, to which the hash had assigned no prompt."]

    def _near_leaks(self) -> list[str]:
        """Prompts of the same words as one of another split. Reported, not refused: order carries meaning."""
        seen: dict[frozenset[str], dict[Split, int]] = {}
        leaks = []
        for line, prompt in zip(self.lines, self.prompts, strict=True):
            words = frozenset(re.findall(r"\w+", normalize(prompt.text)))
            if not words:
                continue
            lines = seen.setdefault(words, {})
            for split, earlier in lines.items():
                if split != prompt.split:
                    leaks.append(
                        f"{self.name}, line {line}: {shown(prompt.text)} (split {prompt.split}) has "
                        f"the same words as line {earlier} (split {split})."
                    )
                    break
            lines.setdefault(prompt.split, line)
        rest = len(leaks) - LISTED
        return leaks[:LISTED] + ([f"{self.name}: {rest:,} more such pairs."] if rest > 0 else [])


def split_of(normalized_text: str) -> Split:
    """The split of a prompt that names none: a function of its normalized text alone, 70/10/20 on average."""
    share = int.from_bytes(lot("split", normalized_text)[:8], "big") / 2**64
    return next((split for split, bound in _SPLIT_BOUNDS if share < bound), "test")


def lot(purpose: str, text: str) -> bytes:
    """What decides where chance must: a hash, so that it is the same on every machine."""
    return hashlib.sha256(f"{purpose}:{text}".encode()).digest()


def _alternatives(allowed: tuple[str, ...]) -> str:
    return ", ".join(allowed[:-1]) + " or " + allowed[-1]


def _lines_named(lines: list[int]) -> str:
    named = ", ".join(str(line) for line in lines[:LISTED])
    rest = len(lines) - LISTED
    return f"line{'s' * (len(lines) > 1)} {named}" + (f" and {rest:,} more" if rest > 0 else "")


def _require_one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise PromptError(f"{shown(value)} is no {what}; use {_alternatives(allowed)}.")


def _decode(data: bytes, name: str) -> str:
    """UTF-8 text with ``\\n`` line endings and without a byte-order mark."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _unix_newlines(data[: error.start].decode("utf-8")).count("\n") + 1
        raise PromptError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
            "save the file as UTF-8 and load it again."
        ) from None
    if data.startswith(codecs.BOM_UTF8):
        text = text[1:]
    return _unix_newlines(text)


def _unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    """At most one byte more than `MAX_FILE_BYTES`: enough to see that a file is too large."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # before opening: a pipe would block, a device never end
            what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
            raise PromptError(f"{path} {what}; name a .jsonl, .txt or .csv file.")
        with path.open("rb") as handle:
            return handle.read(MAX_FILE_BYTES + 1)
    except PromptError:
        raise
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist; check the name and the folder.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise PromptError(f"{str(path)!r} cannot be read: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to the disk, rename. Two writers never share a temporary file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise PromptError(f"{str(path)!r} cannot be written: {_reason(error)}.") from error
