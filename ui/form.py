"""`RunConfig` as a form: what each setting is called, how it is typed, what it may be. Pure: reads and draws nothing.

The form is generated from the schema of `RunConfig`, so a new setting appears by itself. Only the order and the
names of the settings that people change often stand here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from grpo_engine.config import RunConfig, find_problems, flatten
from grpo_engine.methods import METHODS

MAIN: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Learning",
        (
            ("training.learning_rate", "Learning rate"),
            ("training.steps", "Steps"),
            ("training.batch_size", "Prompts a step"),
            ("models.policy.lora.rank", "LoRA rank"),
        ),
    ),
    (
        "Rewrites",
        (
            ("sampling.num_rollouts", "Rollouts a prompt"),
            ("sampling.temperature", "Temperature"),
            ("sampling.top_k", "Top-k"),
            ("sampling.top_p", "Top-p"),
        ),
    ),
    (
        "Objective",
        (
            ("objective.kind", "Loss"),
            ("objective.scale", "Reward scaling"),
            ("objective.kl_coef", "KL penalty"),
            ("objective.clip_ratio", "Clip ratio"),
            ("objective.entropy_coef", "Entropy bonus"),
        ),
    ),
    (
        "Pictures and measuring",
        (
            ("models.image.steps", "Image steps"),
            ("models.image.guidance", "Guidance"),
            ("evaluation.prompts", "Test prompts"),
            ("seed", "Seed"),
        ),
    ),
)
"""The settings people change, in groups: (dotted name, label)."""

OWN_PLACE = {"preset": "Preset", "recording.name": "Run name", "data.prompts": "Prompt set"}
"""Settings that other parts of the screen show."""

SHORT = {"training.learning_rate": "lr", "objective.kl_coef": "KL", "models.policy.lora.rank": "rank"}
"""How a sweep's run names call a setting; others go by their label."""

_CHOICES = {"grpo": "GRPO", "gspo": "GSPO", "cispo": "CISPO", "vqa": "VQA", "three-gpu": "three GPUs",
            "two-gpu": "two GPUs", "one-gpu": "one GPU", "cpu": "CPU", "png": "PNG", "webp": "WebP"}  # fmt: skip
_METHODS = {"dr_grpo": "Dr. GRPO"}  # the others are written in capitals
_CAPITALS = {"kl": "KL", "t5": "T5", "lora": "LoRA"}
_LABELS = {name: label for _, fields in MAIN for name, label in fields} | OWN_PLACE


@dataclass(frozen=True)
class FormField:
    """One setting.

    Attributes:
        name: dotted, as in ``--set``.
        section: where it stands under *All settings*.
        help: what it means, from its description.
        limits: what it may be, in words; empty = anything of its kind.
        kind: "integer", "number", "choice", "switch", "text", "long" (text of several lines), "choices"
            (some of a list) or "list" (free words).
        options: (value, label) of a choice.
        optional: may be left empty.
        group: of the settings people change, else empty.
    """

    name: str
    label: str
    section: str
    help: str
    limits: str
    kind: str
    options: tuple[tuple[str, str], ...]
    optional: bool
    group: str


@lru_cache
def form_fields() -> tuple[FormField, ...]:
    """Every setting: those that people change first, in the order of `MAIN`, then the rest as the schema has them."""
    schema = RunConfig.model_json_schema()
    found = {field.name: field for field in _walk(schema, schema["$defs"], "", "Run")}
    order = [name for _, fields in MAIN for name, _ in fields]
    return tuple(found[name] for name in [*order, *(name for name in found if name not in order)])


def as_data() -> list[dict[str, Any]]:
    """`form_fields` for the browser."""
    return [asdict(field) for field in form_fields()]


def methods() -> list[dict[str, Any]]:
    """The methods that have a name, and the settings each stands for, as the form holds them."""
    return [
        {
            "name": name,
            "label": _METHODS.get(name, name.upper()),
            "parts": {f"objective.{part}": shown(value) for part, value in parts.items()},
        }
        for name, parts in METHODS.items()
    ]


def shown(value: Any) -> Any:
    """A setting's value as the form holds it: numbers as people type them, nothing as an empty text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}e{int(exponent)}" if e else mantissa
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return str(value)


def shown_values(config: RunConfig) -> dict[str, Any]:
    """All settings as the form holds them."""
    return {name: shown(value) for name, value in flatten(config.model_dump(mode="json")).items()}


def settings(base: RunConfig, typed: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with what was typed into the form, as nested plain data that `RunConfig.parse` takes.

    Nothing is refused here: what can't be read as a number stays text, and unknown names stay unknown, so that
    `find_problems` says what is wrong with them.
    """
    kinds = {field.name: field for field in form_fields()}
    data = base.model_dump(mode="json")
    for name, value in typed.items():
        field = kinds.get(name)
        node: Any = data
        *parents, leaf = name.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):  # a setting taken for a section
                child = node[parent] = {}
            node = child
        node[leaf] = _typed(value, field) if field else value
    return data


def _typed(value: Any, field: FormField) -> Any:
    if not isinstance(value, str):
        return value
    if field.kind in ("integer", "number"):
        text = value.strip()
        if not text and field.optional:
            return None
        return number(text, field.kind)
    return value if field.kind in ("text", "long") else value.strip()


def number(text: str, kind: str) -> int | float | str:
    """A number as typed (``1e-6``, ``100``, ``1e3``); what is none stays text."""
    if kind == "integer":
        try:
            return int(text)
        except ValueError:
            pass
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if kind == "integer" and math.isfinite(value) and value.is_integer() else value


def problems(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is wrong: ``{"fields": {name: sentence}, "top": [{"sentence", "field"}]}``, both empty when all is fine.

    A sentence under "fields" stands at its field, so it does not name it again. What is about several settings
    stands on top, with the first setting it names.
    """
    known = {field.name for field in form_fields()}
    fields: dict[str, str] = {}
    top: list[dict[str, str]] = []
    for name, sentence in find_problems(data):
        while name and name not in known and name.rpartition(".")[0] in known:  # an item of a list
            name = name.rpartition(".")[0]
        own = _own_word(sentence, name)
        if name in known:
            fields.setdefault(name, _at_field(sentence))
        elif own in known:
            fields.setdefault(own, _capital(sentence.removeprefix(f"{name}: ")))
        else:
            top.append({"sentence": sentence, "field": named_in(sentence)})
    return {"fields": fields, "top": top}


def named_in(sentence: str) -> str:
    """The first setting that a sentence names in full; empty if it names none."""
    places = [
        (sentence.find(field.name), -len(field.name), field.name)
        for field in form_fields()
        if "." in field.name and field.name in sentence
    ]
    return min(places)[2] if places else ""


def _own_word(sentence: str, section: str) -> str:
    """The setting of ``section`` with whose name a sentence about that section begins."""
    return f"{section}.{sentence.removeprefix(f'{section}: ').partition(' ')[0]}" if section else ""


def _at_field(sentence: str) -> str:
    allowed = sentence.partition(", but it ")[2].partition(", unable to parse")[0].rstrip(".")
    return f"{_capital(allowed)}." if allowed else sentence


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- the schema ----------------------------------------------------------------------------------------------


def _walk(schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, section: str) -> Iterable[FormField]:
    for key, entry in schema["properties"].items():
        name = f"{prefix}{key}"
        if "$ref" in entry:
            inner = defs[entry["$ref"].rpartition("/")[2]]
            if section == "Run":
                below = _capital(_words(key))
            else:
                below = f"{_capital(_words(key))} model" if section == "Models" else f"{section}: {_words(key)}"
            yield from _walk(inner, defs, f"{name}.", below)
        else:
            yield _field(name, entry, section)


def _field(name: str, entry: Mapping[str, Any], section: str) -> FormField:
    kinds = [part for part in entry.get("anyOf", [entry]) if part.get("type") != "null"]
    schema = kinds[0]
    values = schema.get("enum") or schema.get("items", {}).get("enum") or ()
    return FormField(
        name=name,
        label=_LABELS.get(name) or _capital(_words(name.rpartition(".")[2])),
        section=section,
        help=entry["description"],
        limits=_limits(schema),
        kind=_kind(schema, advanced=entry["advanced"]),
        options=tuple((str(value), _CHOICES.get(str(value), str(value).replace("_", " "))) for value in values),
        optional=len(kinds) < len(entry.get("anyOf", [entry])),
        group=next((group for group, fields in MAIN if name in dict(fields)), ""),
    )


def _kind(schema: Mapping[str, Any], *, advanced: bool) -> str:
    if schema["type"] == "array":
        return "choices" if "enum" in schema["items"] else "list"
    if "enum" in schema:
        return "choice"
    if schema["type"] == "string":
        # An advanced text without a form of its own is prose: a template, a system message.
        return "long" if advanced and "pattern" not in schema and "maxLength" not in schema else "text"
    return {"boolean": "switch"}.get(schema["type"], schema["type"])


def _limits(schema: Mapping[str, Any]) -> str:
    if schema["type"] not in ("integer", "number"):
        return ""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        parts = [f"{_short(low)} to {_short(high)}"]
    else:
        parts = [f"{_short(low)} or more" if low is not None else ""]
        parts += [f"above {_short(above)}" if above is not None else ""]
        parts += [f"up to {_short(high)}" if high is not None else ""]
        parts += [f"below {_short(below)}" if below is not None and below < 2**62 else ""]
    if "multipleOf" in schema:
        parts.append(f"a multiple of {schema['multipleOf']}")
    return ", ".join(part for part in parts if part)


def _short(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def _words(key: str) -> str:
    return " ".join(_CAPITALS.get(word, word) for word in key.split("_"))
