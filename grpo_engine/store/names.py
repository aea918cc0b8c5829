"""What runs are called: their ids, and the one-line texts that people give them."""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable

from .connection import StoreError

NAME_CHARS = 120
TAG_CHARS = 40
NOTE_CHARS = 20_000
_SUFFIX = "abcdefghjkmnpqrstuvwxyz23456789"  # without characters that are mistaken for others


def new_run_id(number: int, preset: str, taken: Callable[[str], bool]) -> str:
    """An id such as ``0007-tiny-k3f9`` that is not ``taken``."""
    word = re.sub(r"[^a-z0-9]+", "-", preset.lower())[:24].strip("-") or "run"
    while True:
        run_id = f"{number:04d}-{word}-{''.join(secrets.choice(_SUFFIX) for _ in range(4))}"
        if not taken(run_id):
            return run_id


def one_line(text: str, limit: int, what: str) -> str:
    """One tidy line of printable text. Raises `StoreError` where it is longer than ``limit``."""
    printable = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") else char for char in text)
    tidy = " ".join(printable.split())
    if len(tidy) > limit:
        raise StoreError(f"The {what} has {len(tidy)} characters; {limit} are allowed, shorten it.")
    return tidy


def tidy_tags(tags: Iterable[str]) -> list[str]:
    """Tags as they are kept: one line each, each once, none empty."""
    return list(dict.fromkeys(tag for tag in (one_line(tag, TAG_CHARS, "tag") for tag in tags) if tag))
