"""Settings: what is refused and in which words, presets, overrides, and the way to YAML and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from grpo_engine.config import (
    PRESETS,
    ConfigError,
    RunConfig,
    Section,
    flatten,
    preset_names,
)
from grpo_engine.methods import METHODS
from grpo_engine.placement import resolve


def refusal(*overrides: str, preset: str | Path = "tiny") -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(preset, overrides)
    message = str(caught.value)
    assert message.endswith((".", "?")), message
    return message


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting that is not a section, by dotted name."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("training.learningrate=1e-3", "training.learning_rate"),
        ("training.kl_coef=0.1", "objective.kl_coef"),
        ("objective.klcoef=0.1", "objective.kl_coef"),
        ("models.policy.lora.rnk=4", "models.policy.lora.rank"),
        ("sed=1", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(override: str, suggested: str) -> None:
    name = override.partition("=")[0]
    assert refusal(override).startswith(f"There is no setting {name!r}; did you mean {suggested!r}?")


def test_an_unknown_key_like_no_other_is_refused_without_a_suggestion() -> None:
    assert refusal("zzzzzz=1") == "There is no setting 'zzzzzz'."


@pytest.mark.parametrize(
    ("override", "value", "allowed"),
    [
        ("training.steps=many", "'many'", "a valid integer"),
        ("training.steps=2.5", "2.5", "a valid integer"),
        ("training.steps=", "''", "a valid integer"),
        ("training.steps=[1, 2]", "[1, 2]", "a valid integer"),
        ("training.learning_rate=fast", "'fast'", "a valid number"),
        ("evaluation.greedy=perhaps", "'perhaps'", "a valid boolean"),
        ("recording.name=7", "7", "a valid string"),
        ("objective.scale=groups", "'groups'", "'group', 'batch' or 'none'"),
        ("models.policy.dtype=int8", "'int8'", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("data.tiers=basic", "'basic'", "a valid tuple"),
        ("data.tiers=[]", "[]", "at least 1 item"),
        ("training=5", "5", "a valid dictionary"),
        ("seed=null", "None", "a valid integer"),
    ],
)
def test_a_wrong_type_is_refused_with_field_value_and_what_is_allowed(override: str, value: str, allowed: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{override.partition('=')[0]} is {value}, but it should "), message
    assert allowed in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("sampling.num_rollouts=1", "greater than or equal to 2"),
        ("training.steps=0", "greater than or equal to 1"),
        ("training.batch_size=-1", "greater than or equal to 1"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.learning_rate=1.5", "less than or equal to 1"),
        ("training.learning_rate=.nan", "finite"),
        ("objective.kl_coef=-0.1", "greater than or equal to 0"),
        ("objective.kl_coef=.inf", "finite"),
        ("objective.clip_ratio=1", "less than 1"),
        ("sampling.temperature=0", "greater than 0"),
        ("sampling.top_p=1.01", "less than or equal to 1"),
        ("models.image.resolution=100", "multiple of 16"),
        ("evaluation.prompts=1", "greater than or equal to 2"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=9223372036854775808", "less than"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_bound(override: str, allowed: str) -> None:
    name, _, value = override.partition("=")
    message = refusal(override)
    assert message.startswith(f"{name} is {yaml.safe_load(value)!r}, but it should be "), message
    assert allowed in message


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda0", "CPU", "cpu:0"])
def test_a_device_that_cannot_be_one_is_refused_in_words_and_not_by_a_pattern(name: str) -> None:
    message = refusal(f"placement.policy={name}")
    assert message.startswith(f"placement.policy is {name!r}, but it should "), message
    assert "(:\\d+)" not in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["models.policy.template=rewrite it"], ["template", "{prompt}"]),
        (["models.policy.template='{prompt} {prompt}'"], ["template", "{prompt}", "once"]),
        (["training.minibatches=5"], ["training.minibatches", "5", "training.batch_size", "4"]),
        (["evaluation.samples=0", "evaluation.greedy=false"], ["evaluation.greedy", "evaluation.samples"]),
        (["evaluation.samples=3"], ["evaluation.samples", "3", "evaluation.images_per_prompt", "2"]),
        (
            ["placement.shard_policy=true", "models.policy.quantize=4bit"],
            ["placement.shard_policy is true", "models.policy.quantize to 'none'", "placement.shard_policy to false"],
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_every_problem_gets_a_sentence_of_its_own() -> None:
    lines = refusal("training.steps=0", "objective.scale=x", "sampling.nothing=1").splitlines()
    beginnings = ("training.steps is 0,", "objective.scale is 'x',", "There is no setting 'sampling.nothing'")
    assert len(lines) == 3
    assert all(any(line.startswith(begin) for line in lines) for begin in beginnings)


@pytest.mark.parametrize("override", ["training.steps", "=5", " =5", "", "--steps 5"])
def test_an_override_without_name_and_value_is_refused(override: str) -> None:
    assert refusal(override) == f"--set takes section.field=value, not {override!r}."


@pytest.mark.parametrize("value", ["[1, 2", "{a: ", "'open", "a: b: c", "2024-13-45"])
def test_an_override_whose_value_is_no_yaml_is_refused(value: str) -> None:
    message = refusal(f"recording.name={value}")
    assert f"recording.name={value}" in message
    assert "quotes" in message


def test_a_setting_is_not_taken_for_a_section() -> None:
    message = refusal("training.steps=1", "training.steps.first=5")
    assert "training.steps.first" in message
    assert "'steps' is a setting, not a section" in message
    assert refusal("recording.name.first=5").startswith("recording.name is {'first': 5}, but it should ")


def test_a_file_that_is_missing_is_refused_with_the_presets(tmp_path: Path) -> None:
    message = refusal(preset=tmp_path / "nothing.yaml")
    assert "nothing.yaml" in message
    assert all(name in message for name in preset_names())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"training:\n  steps: [1\n", 3),
        (b"training: {steps: 1}\n\tseed: 1\n", 2),
        (b"seed: \xff\xfe\n", None),
        (b"recording: {name: 2024-13-45}\n", None),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_its_line(tmp_path: Path, content: bytes, line: int | None) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refusal(preset=path)
    assert str(path) in message
    assert "not valid YAML" in message
    assert line is None or f"line {line}" in message


@pytest.mark.parametrize(("content", "kind"), [("- 1\n- 2\n", "list"), ("just text\n", "str"), ("5\n", "int")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content, encoding="utf-8")
    message = refusal(preset=path)
    assert str(path) in message
    assert kind in message


# -- presets and overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_holds_only_what_differs_from_the_defaults(name: str) -> None:
    config = RunConfig.load(name)
    assert config.preset == name
    written = flatten(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
    same_as_default = [key for key in written if key not in config.differences(RunConfig())]
    assert same_as_default == []


def test_the_default_preset_is_the_embedded_one_and_comes_first() -> None:
    assert preset_names()[0] == "tiny"
    assert RunConfig.load() == RunConfig.load("tiny")
    models = RunConfig.load().models
    assert {models.policy.path, models.image.path, models.reward.path} == {"tiny"}


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert RunConfig.load(path).differences(RunConfig()) == {"preset": ("mine", "tiny")}


def test_the_three_gpu_preset_holds_the_full_scale_values() -> None:
    config = RunConfig.load("three-gpu")
    assert config.training.learning_rate == 1e-6
    assert config.training.batch_size == 4
    assert config.sampling.num_rollouts == 5
    assert config.sampling.max_new_tokens == 20
    assert config.sampling.temperature == 1.2
    assert config.sampling.top_k == 100
    assert config.sampling.top_p == 0.9
    assert config.objective.kl_coef == 0.02
    assert config.objective.clips == (0.2, 0.2)
    assert config.objective.entropy_coef == 0.01
    assert config.models.policy.path == "Qwen/Qwen2-VL-7B-Instruct"
    assert config.models.image.path.startswith("stabilityai/stable-diffusion-3-medium")
    assert (config.models.reward.path, config.models.reward.pretrained) == ("ViT-B-32", "openai")
    placed = resolve(config.placement, devices=["cuda:0", "cuda:1", "cuda:2", "cpu"])
    assert [str(device) for device in (placed.policy, placed.image, placed.reward)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert config.data.prompts == "general"


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", " 1e-6 "])
def test_small_numbers_can_be_written_the_usual_ways(text: str, tmp_path: Path) -> None:
    assert RunConfig.load("tiny", [f"training.learning_rate={text}"]).training.learning_rate == 1e-6
    path = tmp_path / "rate.yaml"
    path.write_text(f"training: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert RunConfig.load(path).training.learning_rate == 1e-6


def test_overrides_reach_every_depth_and_the_last_one_wins() -> None:
    config = RunConfig.load(
        "tiny", ["models.policy.lora.rank=2", "seed=5", "seed=6", "training.steps=1e2", "data.tiers=[basic, complex]"]
    )
    assert config.models.policy.lora.rank == 2
    assert config.seed == 6
    assert config.training.steps == 100
    assert config.data.tiers == ("basic", "complex")


def test_the_clips_default_to_the_clip_ratio_and_can_differ() -> None:
    assert RunConfig.load("tiny", ["objective.clip_ratio=0.1"]).objective.clips == (0.1, 0.1)
    assert RunConfig.load("tiny", ["objective.clip_high=0.28"]).objective.clips == (0.2, 0.28)
    assert RunConfig.load("tiny", ["objective.clip_low=0.3"]).objective.clips == (0.3, 0.2)


def methods_of(objective: dict[str, Any]) -> list[str]:
    """The methods whose parts these settings have: one, or none for a mixture of one's own."""
    return [name for name, parts in METHODS.items() if parts.items() <= objective.items()]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_name_sets_its_parts_and_is_told_by_them(name: str, tmp_path: Path) -> None:
    config = RunConfig.load("tiny", ["objective.scale=batch", f"objective={name}"])
    objective = config.objective.model_dump()
    assert {part: objective[part] for part in METHODS[name]} == dict(METHODS[name])
    untouched = RunConfig.load("tiny").objective.model_dump()
    assert {part: value for part, value in objective.items() if part not in METHODS[name]} == {
        part: value for part, value in untouched.items() if part not in METHODS[name]
    }
    assert methods_of(objective) == [name]
    path = tmp_path / "mine.yaml"
    path.write_text(f"objective: {name}\n", encoding="utf-8")
    assert methods_of(RunConfig.load(path).objective.model_dump()) == [name]


def test_the_parts_of_a_method_can_be_changed_after_it() -> None:
    mixed = RunConfig.load("tiny", ["objective=dapo", "objective.kl_coef=0.01"]).objective
    assert (mixed.kl_coef, mixed.clip_high, mixed.aggregation) == (0.01, 0.28, "token")
    assert methods_of(mixed.model_dump()) == []
    assert RunConfig.load("tiny", ["objective.kl_coef=0.01", "objective=dapo"]).objective.kl_coef == 0


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    assert refusal("objective=ppo").startswith(
        "objective is 'ppo', but no method is known by that name; use grpo, dapo,"
    )


def test_a_loaded_configuration_cannot_be_changed() -> None:
    config = RunConfig.load()
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 5  # type: ignore[misc]


# -- to YAML and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_the_saved_yaml_holds_every_setting_and_loads_to_an_equal_value(name: str, tmp_path: Path) -> None:
    config = RunConfig.load(name, ["training.learning_rate=3e-7", "recording.tags=[a, 'b: c']", "seed=123"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump_yaml(), encoding="utf-8")
    assert RunConfig.load(path) == config
    assert flatten(yaml.safe_load(config.dump_yaml())).keys() == {key for key, _ in fields(RunConfig)}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=30)
@given(name=TEXTS, system=TEXTS, rate=st.floats(1e-12, 1.0), seed=st.integers(0, 2**63 - 1))
@example(name="1e5", system="yes", rate=1e-6, seed=2**63 - 1)
@example(name="null", system="a: b\n\n- c\t\x85\u2028 #\r\n", rate=0.1, seed=0)
@example(name="\x85", system="a\x85b '\u2029", rate=0.1, seed=0)
def test_any_text_and_number_survives_the_saved_yaml(name: str, system: str, rate: float, seed: int) -> None:
    data = {
        "seed": seed,
        "recording": {"name": name, "tags": [name, system]},
        "models": {"policy": {"system": system}},
        "training": {"learning_rate": rate},
    }
    config = RunConfig.parse(data)
    assert RunConfig.parse(yaml.safe_load(config.dump_yaml())) == config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"learning_rate": 1e-6, "steps": 7}},
        {"objective": {"clip_low": 0.1, "clip_high": 0.3}, "evaluation": {"greedy": False}},
        {"recording": {"name": "a run: the first # one", "tags": ["a", "b, c", "no"]}},
        {"data": {"tiers": ["complex"]}, "placement": {"policy": "cuda:0"}},
        {"recording": {"name": "yes"}},
        {"recording": {"name": "007"}},
        {"recording": {"name": "1e5"}},
        {"recording": {"name": "2024-05-01"}},
        {"recording": {"name": " spaces kept "}},
        {"recording": {"tags": [f"a rather long label number {number}" for number in range(12)]}},
        {"models": {"policy": {"template": "Rewrite this prompt so that a picture of it " * 4 + "shows it: {prompt}"}}},
        {"models": {"policy": {"system": "Two lines:\nthis is the second.\n\nAnd \u00e4 third, 'quoted' \"twice\"."}}},
    ],
)
def test_the_overrides_rebuild_the_configuration_from_its_preset(changes: dict[str, Any]) -> None:
    for preset in preset_names():
        config = RunConfig.parse(_merge(RunConfig.load(preset).model_dump(mode="json"), changes))
        overrides = config.as_overrides()
        assert RunConfig.load(preset, overrides) == config
        assert (overrides == []) == (config == RunConfig.load(preset))


def test_the_overrides_rebuild_a_configuration_that_came_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {steps: 7}\n", encoding="utf-8")
    config = RunConfig.load(path)
    rebuilt = RunConfig.load("tiny", config.as_overrides())
    assert {name: pair for name, pair in rebuilt.differences(config).items() if name != "preset"} == {}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def test_differences_name_the_settings_and_both_values() -> None:
    first = RunConfig.load("tiny", ["seed=1", "objective.kl_coef=0.5"])
    second = RunConfig.load("tiny", ["seed=2"])
    assert first.differences(second) == {"seed": (1, 2), "objective.kl_coef": (0.5, second.objective.kl_coef)}
    assert first.differences(first) == {}


# -- the form that is built from it --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "info"), list(fields(RunConfig)))
def test_every_setting_is_described_and_bounded(name: str, info: FieldInfo) -> None:
    assert info.description is not None
    assert len(info.description) > 10
    assert info.description.endswith((".", ";")), "a help text is a sentence"
    assert isinstance(info.json_schema_extra, dict)
    assert isinstance(info.json_schema_extra["advanced"], bool)
    kinds = {part.strip() for part in str(info.annotation).replace("<class '", "").replace("'>", "").split("|")}
    if kinds & {"int", "float"}:
        limits = {type(entry).__name__ for entry in info.metadata}
        assert limits & {"Ge", "Gt"}, f"{name} has no lower bound"


def test_every_section_is_described() -> None:
    def sections(section: type[Section]) -> Iterator[type[Section]]:
        yield section
        for info in section.model_fields.values():
            if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
                yield from sections(info.annotation)

    assert [section.__name__ for section in sections(RunConfig) if not (section.__doc__ or "").strip()] == []
    assert {"models", "placement", "sampling", "objective", "training", "data", "evaluation", "recording", "seed"} <= (
        RunConfig.model_fields.keys()
    )
