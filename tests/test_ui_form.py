"""The train form as a description: generated from the schema, read back exactly, faults placed at their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_engine.config import RunConfig, flatten, preset_names
from ui import form
from ui.context import Refused
from ui.form import form_fields, named_in, number, problems, shown, shown_values
from ui.sweep import axes, grid, next_tag

FIELDS = {field.name: field for field in form_fields()}

# What people change, as the screen promises it.
PROMISED = [
    "training.learning_rate", "training.batch_size", "sampling.num_rollouts", "sampling.temperature", "sampling.top_k",
    "sampling.top_p", "objective.kl_coef", "objective.clip_ratio", "objective.entropy_coef", "training.steps",
    "objective.kind", "objective.scale", "models.policy.lora.rank", "models.image.steps", "models.image.guidance",
    "seed",
]  # fmt: skip


def typed(values: dict[str, Any]) -> RunConfig:
    return RunConfig.parse(form.settings(RunConfig.load("tiny"), values))


def wrong(values: dict[str, Any]) -> dict[str, Any]:
    return problems(form.settings(RunConfig.load("tiny"), values))


# -- the description -----------------------------------------------------------------------------------------


def test_every_setting_is_in_the_form_once_so_that_a_new_one_appears_by_itself() -> None:
    assert sorted(field.name for field in form_fields()) == sorted(flatten(RunConfig().model_dump(mode="json")))


@pytest.mark.parametrize("name", PROMISED)
def test_the_settings_people_change_come_first_in_a_group_and_with_a_name_for_people(name: str) -> None:
    field = FIELDS[name]
    assert field.group
    assert "_" not in field.label
    assert list(FIELDS).index(name) < list(FIELDS).index("models.policy.path")


def test_every_setting_has_its_help_and_a_section() -> None:
    assert [field.name for field in form_fields() if not (field.help.strip() and field.section and field.label)] == []


@pytest.mark.parametrize(
    ("name", "kind", "limits"),
    [
        ("training.steps", "integer", "1 to 10,000,000"),
        ("training.learning_rate", "number", "above 0, up to 1"),
        ("objective.clip_ratio", "number", "above 0, below 1"),
        ("objective.min_std", "number", "0 or more"),
        ("models.image.resolution", "integer", "32 to 2,048, a multiple of 16"),
        ("seed", "integer", "0 or more"),
        ("evaluation.greedy", "switch", ""),
        ("objective.kind", "choice", ""),
        ("data.tiers", "choices", ""),
        ("recording.tags", "list", ""),
        ("recording.name", "text", ""),
        ("models.policy.template", "long", ""),
        ("placement.policy", "text", ""),
    ],
)
def test_kind_and_bounds_come_from_the_schema(name: str, kind: str, limits: str) -> None:
    assert (FIELDS[name].kind, FIELDS[name].limits) == (kind, limits)


def test_choices_keep_their_values_and_only_read_better() -> None:
    assert FIELDS["objective.kind"].options == (("grpo", "GRPO"), ("gspo", "GSPO"), ("cispo", "CISPO"))
    assert FIELDS["objective.baseline"].options[1] == ("leave_one_out", "leave one out")
    assert [name for name, field in FIELDS.items() if field.optional] == ["objective.clip_low", "objective.clip_high"]


# -- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_what_the_form_shows_reads_back_to_the_same_settings(name: str) -> None:
    base = RunConfig.load(name)
    assert RunConfig.parse(form.settings(RunConfig(), shown_values(base))) == base


@pytest.mark.parametrize("method", form.methods(), ids=lambda method: method["label"])
def test_the_parts_of_a_method_read_as_those_of_its_name(method: dict[str, Any]) -> None:
    assert typed(method["parts"]).objective == RunConfig.load("tiny", [f"objective={method['name']}"]).objective


@settings(deadline=None, max_examples=60)
@given(rate=st.floats(1e-12, 1.0), seed=st.integers(0, 2**63 - 1), system=st.text(max_size=40))
@example(rate=1e-6, seed=2**63 - 1, system=" 1e-6\n")
@example(rate=1.0, seed=10**16 + 1, system="null")
def test_any_number_and_text_survives_the_form(rate: float, seed: int, system: str) -> None:
    values = {"training.learning_rate": shown(rate), "seed": shown(seed), "models.policy.system": shown(system)}
    config = typed(values)
    assert (config.training.learning_rate, config.seed, config.models.policy.system) == (rate, seed, system)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-6, "1e-6"), (0.001, "0.001"), (2.5e-7, "2.5e-7"), (32.0, "32"), (0.0, "0"), (100, "100"), (None, "")],
)
def test_values_are_shown_the_way_people_type_them(value: Any, text: Any) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("text", ["1e-6", " 1E-6 ", "0.000001", "1.0e-06"])
def test_small_numbers_are_accepted_as_typed(text: str) -> None:
    assert typed({"training.learning_rate": text}).training.learning_rate == 1e-6


def test_whole_numbers_are_accepted_in_the_usual_spellings() -> None:
    assert [typed({"training.steps": text}).training.steps for text in ("50", " 50", "5e1", "50.0")] == [50] * 4
    assert number("9223372036854775807", "integer") == 2**63 - 1  # not by way of a float, which would round it


def test_an_optional_number_left_empty_is_none_and_a_required_one_is_refused() -> None:
    assert typed({"objective.clip_low": ""}).objective.clip_low is None
    assert typed({"objective.clip_low": "0.1"}).objective.clip_low == 0.1
    assert list(wrong({"training.steps": ""})["fields"]) == ["training.steps"]


# -- what is wrong, and where --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("training.steps", "0", "greater than or equal to 1"),
        ("training.steps", "2.5", "integer"),
        ("training.steps", "many", "integer"),
        ("training.learning_rate", "fast", "number"),
        ("training.learning_rate", "1,5", "number"),
        ("training.learning_rate", "nan", "finite"),
        ("training.learning_rate", "1e999", "finite"),
        ("training.learning_rate", None, "number"),
        ("objective.scale", "groups", "'group', 'batch' or 'none'"),
        ("evaluation.greedy", "perhaps", "boolean"),
        ("data.tiers", ["basic", "hard"], "'basic', 'challenging' or 'complex'"),
        ("data.tiers", [], "at least 1 item"),
        ("models.image.resolution", "100", "multiple of 16"),
        ("placement.policy", "gpu", "cuda:0"),
        ("seed", "9" * 30, "less than"),
        ("seed", "9" * 5000, "finite"),
    ],
)
def test_a_fault_of_one_setting_stands_at_it_in_one_sentence(name: str, value: Any, words: str) -> None:
    found = wrong({name: value})
    assert list(found["fields"]) == [name], found
    assert found["top"] == []
    assert words in found["fields"][name]
    assert found["fields"][name].endswith(".")
    assert name not in found["fields"][name], "at the field its name need not be said"


def test_a_rule_of_a_section_stands_at_the_setting_it_is_about() -> None:
    assert wrong({"models.policy.template": "rewrite this"}) == {
        "fields": {"models.policy.template": "Template must contain {prompt} exactly once."},
        "top": [],
    }


def test_settings_that_do_not_fit_together_stand_on_top_with_the_first_one_named() -> None:
    found = wrong({"training.minibatches": "9"})
    assert found["fields"] == {}
    assert [item["field"] for item in found["top"]] == ["training.minibatches"]
    assert "training.batch_size" in found["top"][0]["sentence"]


@pytest.mark.parametrize("name", ["training.learningrate", "training.steps.first", "nothing", "", ".", "data"])
def test_an_unknown_setting_is_a_fault_and_never_an_exception(name: str) -> None:
    found = wrong({name: "5"})
    assert found["fields"] or found["top"]


def test_every_fault_is_found_at_once() -> None:
    found = wrong({"training.steps": "0", "objective.kl_coef": "-1", "models.policy.question": "what is it?"})
    assert sorted(found["fields"]) == ["models.policy.question", "objective.kl_coef", "training.steps"]


def test_the_setting_a_sentence_names_first_is_found_whole() -> None:
    assert named_in("data.prompts 'x' has no prompts; set evaluation.every to 0.") == "data.prompts"
    assert named_in("evaluation.prompts is 5, not evaluation.every") == "evaluation.prompts"
    assert named_in("models.reward.weights.clip is 200") == "models.reward.weights.clip"
    assert named_in("the disk is full") == ""


# -- sweeps --------------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_with_names_that_tell_them_apart() -> None:
    runs = grid(axes([("training.learning_rate", ["1e-3", "1e-4"]), ("objective.kl_coef", ["0.02", "0.1", "0"])]))
    names = [name for name, _ in runs]
    assert names[:4] == ["lr 1e-3, KL 0.02", "lr 1e-3, KL 0.1", "lr 1e-3, KL 0", "lr 1e-4, KL 0.02"]
    assert len(set(names)) == 6
    configs = [typed(values) for _, values in runs]
    assert {(config.training.learning_rate, config.objective.kl_coef) for config in configs} == {
        (rate, kl) for rate in (1e-3, 1e-4) for kl in (0.02, 0.1, 0.0)
    }


def test_a_value_given_twice_in_two_spellings_is_one_run() -> None:
    assert [name for name, _ in grid(axes([("training.learning_rate", ["1e-3", " 0.001", ""])]))] == ["lr 1e-3"]


def test_switches_and_choices_can_be_swept_and_a_prefix_stands_before_the_names() -> None:
    assert grid(axes([("evaluation.greedy", ["on", "off"])]), "mine") == [
        ("mine: greedy on", {"evaluation.greedy": True}),
        ("mine: greedy off", {"evaluation.greedy": False}),
    ]
    assert [typed(values).objective.scale for _, values in grid(axes([("objective.scale", ["none", "batch"])]))] == [
        "none",
        "batch",
    ]


def test_names_never_exceed_what_a_run_may_be_called() -> None:
    (name, values), *_ = grid(axes([("sampling.top_p", ["0.5", "0.9"])]), "x" * 120)
    assert len(name) == 120
    assert values == {"sampling.top_p": "0.5"}


SEEDS = [str(seed) for seed in range(200)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "one or two"),
        ([("seed", ["1"]), ("training.steps", ["1"]), ("sampling.top_k", ["1"])], "one or two"),
        ([("seed", ["1"]), ("seed", ["2"])], "twice"),
        ([("seed", [" ", ""])], "some values"),
        ([("seed", SEEDS[:101])], "101 runs"),
        ([("seed", SEEDS), ("training.steps", SEEDS)], "40,000 runs"),
        ([("recording.name", ["a"])], "can't be swept"),
        ([("data.tiers", ["basic"])], "can't be swept"),
        ([("training.stepps", ["1"])], "can't be swept"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(asked: list[tuple[str, list[str]]], words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        axes(asked)
    assert str(caught.value).endswith(".")


def test_a_hundred_runs_are_a_sweep() -> None:
    assert len(grid(axes([("seed", SEEDS[:50]), ("training.steps", ["1", "2"])]))) == 100


def tags() -> Iterator[tuple[list[str], str]]:
    yield [], "sweep 1"
    yield ["mine", "sweep 2", "sweep 10", "sweep x", "sweep ", "sweep 99999999999999"], "sweep 11"


@pytest.mark.parametrize(("there", "fresh"), list(tags()))
def test_each_sweep_gets_a_tag_of_its_own(there: list[str], fresh: str) -> None:
    assert next_tag(there) == fresh
