"""What is asked of the playground: the prompt, its columns, seeds; and the checks that need no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .prompts import PromptError, parse_prompts

MOST_COLUMNS = 6
MOST_PICTURES = 4  # a column

Kind = Literal["original", "untrained", "checkpoint", "edited"]


class PlaygroundError(ValueError):
    """A try that can't be made; one plain sentence. ``field`` names what it is about, as in `Try`."""

    def __init__(self, sentence: str, field: str = "") -> None:
        super().__init__(sentence)
        self.field = field


class PlaygroundBusy(PlaygroundError):
    """Too many tries wait already."""


class PlaygroundCrowded(PlaygroundError):
    """A run holds the device, and there may be no room beside it."""


@dataclass(frozen=True)
class Column:
    """One way from the prompt to a text that is drawn.

    Attributes:
        kind: the prompt as it is, or rewritten by the untrained policy, by a checkpoint, or by hand.
        text: the rewrite by hand.
        settings: of the checkpoint's run, as plain data.
        folder: of the checkpoint's run.
        which: the checkpoint: "last", "best" or a step.
    """

    kind: Kind
    text: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    which: Literal["last", "best"] | int = "last"


@dataclass(frozen=True)
class Try:
    """What is asked of the playground. Everything random follows from the two seeds.

    Attributes:
        settings: whose image model, reward model and base policy are used, as plain data of a `RunConfig`.
        latent_seed: of the first picture of each column; the seeds of the others are derived from it.
        pictures: of each column, on latents that the columns share.
        sample_seed: of every rewrite that is sampled.
        temperature: in place of the runs' own; None = theirs.
        request: what the prompt asks for, machine-readable, where its prompt set says so.
        beside: (name and state, settings) of every run that holds its devices at the moment.
    """

    prompt: str
    settings: Mapping[str, Any]
    columns: tuple[Column, ...]
    latent_seed: int = 0
    pictures: int = 1
    sample_seed: int = 0
    greedy: bool = False
    temperature: float | None = None
    request: Mapping[str, Any] | None = None
    beside: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def check(self) -> None:
        """Refuse too much or nothing.

        Raises:
            PlaygroundError: too many or no columns or pictures.
        """
        if not 1 <= len(self.columns) <= MOST_COLUMNS:
            raise PlaygroundError(f"Choose between 1 and {MOST_COLUMNS} columns, not {len(self.columns)}.", "columns")
        if not 1 <= self.pictures <= MOST_PICTURES:
            raise PlaygroundError(f"Choose between 1 and {MOST_PICTURES} pictures, not {self.pictures}.", "pictures")


class Saved(NamedTuple):
    """The checkpoints in a run's folder, by step; ``last`` and ``best`` where they are known."""

    steps: tuple[int, ...]
    last: int | None
    best: int | None


def saved_checkpoints(folder: Path) -> Saved:
    """What is there, by the names alone: nothing is verified, and a folder that is not there holds none."""
    names = [re.fullmatch(r"step-(\d{6,12})", path.name) for path in (folder / "checkpoints").glob("step-*")]
    steps = tuple(sorted(int(match[1]) for match in names if match))
    try:
        index = dict(json.loads((folder / "checkpoints" / "index.json").read_text(encoding="utf-8")))
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # lost or odd: then none is known to be the last or best
        index = {}
    named = {f"step-{step:06d}": step for step in steps}
    return Saved(steps, named.get(str(index.get("last"))), named.get(str(index.get("best"))))


def tidy_prompt(text: str, max_chars: int) -> str:
    """The prompt on one line, checked as a prompt set's are (but for its tokens, which need a tokenizer).

    Raises:
        PlaygroundError: it is empty, too long, or holds what no prompt may.
    """
    line = " ".join(text.split())
    if not line:
        raise PlaygroundError("Write a prompt first, or take one of the examples.", "prompt")
    row = json.dumps({"text": line}).encode()
    try:
        return parse_prompts(row, name="prompt", kind="jsonl", max_chars=max_chars).prompts[0].text
    except PromptError as error:
        problem = error.problems[0].partition(": ")[2]  # without the file and the line, which there are not
        raise PlaygroundError(problem[:1].upper() + problem[1:], "prompt") from error
