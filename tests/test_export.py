"""Exports: each format loads the way its card says, and nothing is overwritten or changed on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved_policy import (
    Policy,
    load_policy,
    logits,
    new_optimizer,
    run_config,
    same,
    train,
    weights,
    write_base,
)
from transformers import AutoModelForImageTextToText, AutoTokenizer

from grpo_engine.checkpoint import CheckpointError, save_checkpoint
from grpo_engine.config import RunConfig
from grpo_engine.evaluation import summarise
from grpo_engine.export import ExportError, export
from grpo_engine.model_card import Format, portable
from grpo_engine.recorder import EvaluationItem
from grpo_engine.rollout import Score


def item(arm: str, prompt: int, reward: float) -> EvaluationItem:
    score = Score({"clip": reward}, reward)
    return EvaluationItem(arm, f"p{prompt}", "w9", "basic", 0, prompt, "w8", score, None, {}, None)


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """An evaluation on two prompts, each of which gained exactly 1.25."""
    rewards = {"original": 24.0, "untrained": 20.0, "trained": 21.25}
    items = [item(arm, prompt, reward + prompt) for arm, reward in rewards.items() for prompt in range(2)]
    return summarise(items, RunConfig())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


def trained_run(base: Path, run: Path, adapter: str) -> tuple[Policy, Path]:
    """A policy with training steps after its checkpoint, and the run's folder."""
    policy = load_policy(base, adapter=adapter)
    optimizer = new_optimizer(policy)
    config = run_config(base, adapter=adapter, system="w20", template="w21 {prompt} 'w22' \n w23")
    train(policy, optimizer, range(2))
    save_checkpoint(
        run,
        policy=policy,
        optimizer=optimizer,
        step=2,
        config=config,
        metrics={"reward_mean": 31.5, "entropy": 2.5},
    )
    return policy, run


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    return trained_run(base, tmp_path_factory.mktemp("lora"), "lora")


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    return trained_run(base, tmp_path_factory.mktemp("full"), "full")


def run_card(folder: Path, base: Path) -> dict[str, Any]:
    """Execute the model card's Python, beside a base model, with a pipeline that returns the text it was given."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base)
    space: dict[str, Any] = {"pipeline": lambda text: SimpleNamespace(images=[text])}
    here = os.getcwd()
    os.chdir(folder)
    try:
        exec(code.group(1), space)
    finally:
        os.chdir(here)
    return space


@pytest.mark.parametrize("format", ["peft", "merged", "pth"])
def test_the_model_card_runs_as_written_and_gives_the_trained_policy(
    base: Path, lora: tuple[Policy, Path], summary: dict[str, Any], tmp_path: Path, format: Format
) -> None:
    policy, run = lora
    target = export(run, tmp_path / "out", format=format, policy=policy, summary=summary)
    space = run_card(target, base)
    assert torch.allclose(logits(space["policy"]), logits(policy.model), atol=1e-4)
    assert isinstance(space["image"], str)
    asked: list[list[int]] = []
    generate = space["policy"].generate
    space["policy"].generate = lambda **inputs: asked.extend(inputs["input_ids"].tolist()) or generate(**inputs)
    space["rewrite"]("a red cube on a green table")
    request = "w20 w21 a red cube on a green table 'w22' \n w23 <eos>"
    assert asked == [policy.processor(request).input_ids]


@pytest.mark.parametrize("format", ["merged", "pth"])
def test_a_fully_trained_policy_is_exported_whole(
    base: Path, full: tuple[Policy, Path], tmp_path: Path, format: Format
) -> None:
    policy, run = full
    target = export(run, tmp_path / "out", format=format, policy=policy)
    assert torch.equal(logits(run_card(target, base)["policy"]), logits(policy.model))


def test_peft_holds_the_adapter_the_card_the_settings_and_the_metrics(
    base: Path, lora: tuple[Policy, Path], summary: dict[str, Any], tmp_path: Path
) -> None:
    policy, run = lora
    target = export(run, tmp_path / "new" / "out", format="peft", summary=summary)
    assert sorted(file.name for file in target.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "metrics.json",
    ]
    plain = AutoModelForImageTextToText.from_pretrained(base)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, target)), logits(policy.model))
    numbers = json.loads((target / "metrics.json").read_text())
    assert numbers["metrics"] == {"reward_mean": 31.5, "entropy": 2.5}
    assert (numbers["step"], numbers["evaluation"]) == (2, json.loads(json.dumps(summary)))
    assert RunConfig.load(target / "config.yaml").models.policy.path == base.name
    card = (target / "README.md").read_text()
    assert summary["sentence"] in card
    assert "| trained vs untrained | +1.25 | +1.25 to +1.25 | 2 | 100% |" in card
    assert "| trained vs original | -2.75 | -2.75 to -2.75 | 2 | 0% |" in card
    assert "| Request | w21 {prompt} 'w22' <br> w23 |" in card and "| System message | w20 |" in card


def test_merged_loads_through_the_auto_classes_with_its_tokenizer(lora: tuple[Policy, Path], tmp_path: Path) -> None:
    policy, run = lora
    target = export(run, tmp_path / "out", format="merged", policy=policy)
    merged = AutoModelForImageTextToText.from_pretrained(target)
    assert type(merged).__name__ == "Qwen2VLForConditionalGeneration"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(policy.model), atol=1e-4)
    assert AutoTokenizer.from_pretrained(target).get_vocab() == policy.processor.get_vocab()


def test_the_pth_file_holds_plain_tensors_and_plain_data(
    lora: tuple[Policy, Path], summary: dict[str, Any], tmp_path: Path
) -> None:
    policy, run = lora
    file = export(run, tmp_path / "out", format="pth", summary=summary) / "pure_grpo_policy.pth"
    saved = torch.load(file, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in saved["weights"].values())
    assert len(saved["weights"]) == len(policy.trainable())
    metadata = saved["metadata"]
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["adapter"]["r"] == 4 and metadata["evaluation"]["gains"]["trained_vs_untrained"]["n"] == 2


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_an_export_takes_the_checkpoint_and_never_changes_the_policy(base: Path, tmp_path: Path, adapter: str) -> None:
    policy, run = trained_run(base, tmp_path / "run", adapter)
    expected = logits(policy.model)
    train(policy, new_optimizer(policy), range(2, 4))
    before, flags = weights(policy), {name: p.requires_grad for name, p in policy.model.named_parameters()}
    assert not torch.equal(logits(policy.model), expected)
    target = export(run, tmp_path / "out", format="merged", policy=policy)
    assert torch.allclose(logits(AutoModelForImageTextToText.from_pretrained(target)), expected, atol=1e-4)
    assert same(before, weights(policy))
    assert flags == {name: p.requires_grad for name, p in policy.model.named_parameters()}


def test_no_export_names_the_folder_a_hub_model_was_loaded_from(base: Path, tmp_path: Path) -> None:
    policy = load_policy(base)
    config = RunConfig.parse({"models": {"policy": {"path": "Qwen/Qwen2-VL-2B-Instruct"}}})
    path = save_checkpoint(tmp_path, policy=policy, optimizer=new_optimizer(policy), step=1, config=config, metrics={})
    for format in ("peft", "merged", "pth"):
        target = export(path, tmp_path / format, format=format, policy=policy)
        assert not [file for file in target.iterdir() if str(base.parent).encode() in file.read_bytes()]
        card = (target / "README.md").read_text()
        assert "\nbase_model: Qwen/Qwen2-VL-2B-Instruct\n" in card
        assert "No gain was measured" in card
        if format == "peft":
            adapter = json.loads((target / "adapter_config.json").read_text())
            assert adapter["base_model_name_or_path"] == "Qwen/Qwen2-VL-2B-Instruct"


def test_an_export_names_no_folder_of_this_machine(base: Path, tmp_path: Path) -> None:
    policy = load_policy(base)
    paths = {"policy": str(base), "image": "~/models/sd3", "reward": str(tmp_path / "clip")}
    settings: dict[str, Any] = {"models": {part: {"path": path} for part, path in paths.items()}}
    settings["models"]["reward"]["aesthetic"] = str(tmp_path / "head.pth")
    config = RunConfig.parse(settings | {"data": {"prompts": str(tmp_path / "mine.txt")}})
    run = save_checkpoint(tmp_path, policy=policy, optimizer=new_optimizer(policy), step=1, config=config, metrics={})
    for format in ("peft", "merged", "pth"):
        target = export(run, tmp_path / format, format=format, policy=policy)
        for file in target.rglob("*"):
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content and str(base.parent).encode() not in content, file.name
            assert b"~/" not in content or file.suffix == ".safetensors", file.name
        kept = RunConfig.load(target / "config.yaml")
        assert (kept.models.image.path, kept.models.reward.path, kept.data.prompts) == ("sd3", "clip", "mine.txt")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", ""),
        ("tiny", "tiny"),
        ("ViT-B-32", "ViT-B-32"),
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        ("/cache/hub/models--Qwen--Qwen2-VL-7B-Instruct/snapshots/a1b2", "Qwen/Qwen2-VL-7B-Instruct"),
        ("/data/models/qwen", "qwen"),
        ("../qwen/", "qwen"),
        ("~/qwen", "qwen"),
    ],
)
def test_a_path_is_told_so_that_others_can_use_it(path: str, name: str) -> None:
    assert portable(path) == name


# -- refusals ------------------------------------------------------------------------------------------------


def test_only_an_earlier_export_is_replaced_and_only_when_forced(lora: tuple[Policy, Path], tmp_path: Path) -> None:
    _, run = lora
    target = tmp_path / "out"
    target.mkdir()
    assert export(run, target, format="pth") == target
    with pytest.raises(ExportError, match="already holds an export; .*--force"):
        export(run, target, format="peft")
    export(run, target, format="peft", force=True)
    assert not (target / "pure_grpo_policy.pth").exists() and (target / "adapter_config.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    for name, content in (
        ("thesis.txt", "work"),
        ("metrics.json", '{"reward": 1}'),
        ("metrics.json", "not json"),
    ):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / name).write_text(content)
        for force in (False, True):
            with pytest.raises(ExportError, match="not empty and not an export of this program"):
                export(run, mine, format="peft", force=force)
        assert (mine / name).read_text() == content
        shutil.rmtree(mine)
    (tmp_path / "file").write_text("work")
    with pytest.raises(ExportError, match="not empty"):
        export(run, tmp_path / "file", format="peft", force=True)


def test_formats_that_do_not_fit_the_policy_are_refused(
    base: Path, lora: tuple[Policy, Path], full: tuple[Policy, Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="there is no adapter to export; use the format merged or pth"):
        export(full[1], tmp_path / "out", format="peft", policy=full[0])
    with pytest.raises(ExportError, match="needs the policy's base model"):
        export(lora[1], tmp_path / "out", format="merged")
    with pytest.raises(CheckpointError, match="does not belong to this policy"):
        export(lora[1], tmp_path / "out", format="merged", policy=load_policy(base, rank=2))
    quantized = load_policy(base)
    quantized.model.get_base_model().hf_quantizer = object()
    with pytest.raises(ExportError, match="can't be merged without loss"):
        export(lora[1], tmp_path / "out", format="merged", policy=quantized)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(lora: tuple[Policy, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(lora[1], tmp_path / "run"))
    (run / "checkpoints/step-000002/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(run, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_an_export_killed_half_way_is_cleaned_up_by_the_next(lora: tuple[Policy, Path], tmp_path: Path) -> None:
    _, run = lora
    target = export(run, tmp_path / "out", format="pth")
    (tmp_path / ".partial-out-123").mkdir()
    (tmp_path / ".partial-out-123" / "half").write_text("x")
    (tmp_path / ".partial-outer-123").mkdir()  # another export's
    os.rename(target, tmp_path / ".replaced-out-123")
    with pytest.raises(ExportError, match="already holds an export"):
        export(run, tmp_path / "out", format="peft")
    export(run, tmp_path / "out", format="peft", force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".partial-outer-123", "out"]
