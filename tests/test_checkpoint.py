"""Checkpoints: bit for bit what was saved, and refused when they are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved_policy import (
    Policy,
    Trained,
    batch,
    load_policy,
    logits,
    new_optimizer,
    run_config,
    same,
    save,
    train,
    weights,
    write_base,
)
from transformers import AutoModelForImageTextToText

from grpo_engine import checkpoint_folder
from grpo_engine.checkpoint import (
    CheckpointError,
    config_fingerprint,
    load_checkpoint,
    read_rollouts,
    save_checkpoint,
    take_snapshot,
    verify_checkpoint,
    write_checkpoint,
)
from grpo_engine.config import RunConfig
from grpo_engine.rollout import Completions

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.yaml",
    "optimizer.safetensors",
    "state.json",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> Trained:
    """A policy after two steps; tests only read it."""
    policy = load_policy(base)
    optimizer = new_optimizer(policy)
    train(policy, optimizer, range(2))
    return policy, optimizer


@pytest.fixture(scope="module")
def saved(base: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it; tests only read it."""
    return save(tmp_path_factory.mktemp("run"), base, trained, 2)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite ``state.json`` with valid checksums, as another program might have written it."""
    state = json.loads((folder / "state.json").read_bytes())
    del state["checksum"]
    state["files"] = {name: checkpoint_folder.sha256(folder / name) for name in state["files"]}
    change(state)
    (folder / "state.json").write_bytes(checkpoint_folder.seal(state))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_training_continued_from_a_checkpoint_is_bit_identical(base: Path, tmp_path: Path, adapter: str) -> None:
    policy = load_policy(base, adapter=adapter)
    optimizer = new_optimizer(policy)
    train(policy, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.1 + 0.2  # a schedule's value that has no short decimal form
    config = run_config(base, adapter=adapter)
    path = save_checkpoint(
        tmp_path,
        policy=policy,
        optimizer=optimizer,
        step=2,
        config=config,
        metrics={"a": 1.5},
        extra={"skipped": [3]},
    )
    train(policy, optimizer, range(2, 4))

    resumed = load_policy(base, seed=7, adapter=adapter)
    resumed_optimizer = new_optimizer(resumed, learning_rate=5.0)
    state = load_checkpoint(path, resumed, resumed_optimizer)
    assert (state.step, state.metrics, state.extra, state.kind) == (2, {"a": 1.5}, {"skipped": [3]}, adapter)
    assert resumed_optimizer.param_groups[0]["lr"] == 0.1 + 0.2
    train(resumed, resumed_optimizer, range(2, 4))

    assert same(weights(policy), weights(resumed))
    mine, theirs = optimizer.state_dict(), resumed_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert all(same(mine["state"][key], theirs["state"][key]) for key in mine["state"])


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_snapshot_stays_what_it_was_while_training_goes_on(base: Path, tmp_path: Path, adapter: str) -> None:
    policy = load_policy(base, adapter=adapter)
    optimizer = new_optimizer(policy)
    train(policy, optimizer, range(2))
    what: dict[str, Any] = {"policy": policy, "optimizer": optimizer, "step": 2, "metrics": {"reward_mean": 1.0}}
    what |= {"config": run_config(base, adapter=adapter)}
    at_once = save_checkpoint(tmp_path / "at once", **what)
    snapshot = take_snapshot(**what)
    train(policy, optimizer, range(2, 4))
    later = write_checkpoint(tmp_path / "later", snapshot)
    for file in at_once.iterdir():
        assert (later / file.name).read_bytes() == file.read_bytes(), file.name


def test_rollouts_that_wait_for_the_next_step_come_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    policy = load_policy(base)
    generator = torch.Generator().manual_seed(1)
    waiting = [
        Completions(
            torch.arange(5),
            torch.randint(0, 9, (3, width), generator=generator),
            torch.rand(3, width, generator=generator) > 0.5,
            torch.randn(3, width, generator=generator),
            torch.randn(3, width, generator=generator),
            kept,
            ("ein grüner Kreis", "", 'a "quoted" one\n'),
            torch.tensor([True, False, True]),
        )
        for width, kept in ((4, None), (2, torch.randint(-1, 9, (3, 2, 6), generator=generator)))
    ]
    what: dict[str, Any] = {"policy": policy, "optimizer": new_optimizer(policy), "config": run_config(base)}
    path = save_checkpoint(tmp_path, **what, step=1, metrics={}, rollouts=waiting)
    found = read_rollouts(verify_checkpoint(path))
    for mine, theirs in zip(waiting, found, strict=True):
        assert mine.texts == theirs.texts
        for name in ("prompt_ids", "token_ids", "mask", "logprobs", "entropies", "kept", "finished"):
            one, other = getattr(mine, name), getattr(theirs, name)
            assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one, other)), name
    without = save_checkpoint(tmp_path, **what, step=2, metrics={})
    assert read_rollouts(verify_checkpoint(without)) == []


def test_the_optimizer_file_is_keyed_by_parameter_names_and_keeps_step_counts(saved: Path, trained: Trained) -> None:
    tensors = load_file(saved / "optimizer.safetensors")
    names = trained[0].trainable().keys()
    assert tensors.keys() == {f"{field}:{name}" for field in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert all(tensors[f"step:{name}"].item() == 2.0 for name in names)


def test_a_checkpoint_before_the_first_step_has_no_optimizer_state_and_loads(base: Path, tmp_path: Path) -> None:
    policy = load_policy(base)
    path = save(tmp_path, base, (policy, new_optimizer(policy)), 0)
    fresh = load_policy(base, seed=5)
    optimizer = new_optimizer(fresh)
    assert load_checkpoint(path, fresh, optimizer).step == 0
    assert not optimizer.state
    assert same(weights(policy), weights(fresh))


def test_peft_loads_the_folder_with_equal_logits(base: Path, saved: Path, trained: Trained) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(base)
    untrained = logits(plain)
    loaded = PeftModel.from_pretrained(plain, saved)
    assert torch.equal(logits(loaded), logits(trained[0].model))
    assert (logits(loaded) - untrained).abs().max() > 0.01


def test_a_checkpoint_holds_its_files_and_names_the_configured_base(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    policy, optimizer = trained
    config = RunConfig.parse({"models": {"policy": {"path": "Qwen/Qwen2-VL-2B-Instruct"}}})
    path = save_checkpoint(tmp_path, policy=policy, optimizer=optimizer, step=3, config=config, metrics={})
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert not any(str(base).encode() in file.read_bytes() for file in path.iterdir())
    assert (
        json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == config.models.policy.path
    )
    assert policy.model.peft_config["default"].base_model_name_or_path in (None, str(base))
    assert RunConfig.load(path / "config.yaml") == config
    state = verify_checkpoint(path)
    assert state.config_fingerprint == config_fingerprint(config)
    assert state.versions["torch"] == torch.__version__


def test_metrics_that_are_not_finite_are_stored_as_missing(base: Path, trained: Trained, tmp_path: Path) -> None:
    path = save(tmp_path, base, trained, 1, reward=float("nan"))
    assert verify_checkpoint(path).metrics == {"reward_mean": None}
    assert verify_checkpoint(path).score is None


def test_extra_state_that_json_cannot_hold_is_refused_before_anything_appears(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    for extra, kind in ((batch(0), TypeError), (float("inf"), ValueError)):
        with pytest.raises(kind):
            save(tmp_path, base, trained, 1, extra=extra)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# -- damage and foreign checkpoints --------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_in_any_file_is_detected(saved: Path, data: Any) -> None:
    file = saved / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    where = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[where] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            verify_checkpoint(saved)
    finally:
        file.write_bytes(content)
    assert verify_checkpoint(saved).step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(copied: Path, base: Path, name: str, harm: str) -> None:
    file = copied / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if harm == "empty" else -1])
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(copied)
    sentence = str(caught.value)
    assert str(copied) in sentence and name in sentence and sentence.endswith(".") and "\n" not in sentence


FOREIGN: dict[str, tuple[Callable[[Path], Policy], str]] = {
    "another rank": (lambda base: load_policy(base, rank=2), "r = 4, the policy's has 2"),
    "another scale of equal shapes": (
        lambda base: load_policy(base, alpha=16),
        "lora_alpha = 8, the policy's has 16",
    ),
    "full fine-tuning": (lambda base: load_policy(base, adapter="full"), "adapter=lora, the policy is full"),
    "another base of equal shapes": (
        lambda base: load_policy(write_base(base.parent / "other", seed=3)),
        "holds another model",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_of_another_policy_is_refused_and_changes_nothing(base: Path, saved: Path, case: str) -> None:
    build, reason = FOREIGN[case]
    policy = build(base)
    optimizer = new_optimizer(policy)
    train(policy, optimizer, range(5, 6))
    before, state = weights(policy), {k: dict(v) for k, v in optimizer.state_dict()["state"].items()}
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(saved, policy, optimizer)
    assert same(before, weights(policy))
    assert all(same(state[key], value) for key, value in optimizer.state_dict()["state"].items())


def test_weights_that_the_policy_lacks_or_that_differ_in_shape_or_type_are_refused(base: Path, copied: Path) -> None:
    policy = load_policy(base)
    before = weights(policy)
    file = copied / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    for changed, reason in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, "only the policy has"),
        (tensors | {"extra": torch.zeros(1)}, "such as extra, which only the checkpoint has"),
        (tensors | {first: tensors[first][:-1].clone()}, "has the shape"),
        (tensors | {first: tensors[first].half()}, "torch.float16, the policy's torch.float32"),
    ):
        save_file(changed, file)
        reseal(copied, lambda state: None)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(copied, policy)
    assert same(before, weights(policy))


def test_an_optimizer_of_another_kind_or_grouping_is_refused_and_changes_nothing(base: Path, saved: Path) -> None:
    policy = load_policy(base)
    before = weights(policy)
    parameters = list(policy.trainable().values())
    others = {
        "its optimizer is AdamW, here it is SGD": torch.optim.SGD(parameters, lr=0.1),
        "groups other weights": torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}]),
        "a weight that the policy does not train": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]),
    }
    for reason, optimizer in others.items():
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(saved, policy, optimizer)
        assert not optimizer.state
    assert same(before, weights(policy))


def test_a_newer_format_is_refused_with_the_way_out(copied: Path) -> None:
    reseal(copied, lambda state: state.update(version=2, invented_later=True))
    with pytest.raises(CheckpointError, match=r"newer version .* \(format 2, this one reads up to 1\); update"):
        verify_checkpoint(copied)


@pytest.mark.parametrize("content", ["[]", '{"format": "something-else"}', '{"step": 3}'])
def test_a_folder_of_another_program_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program"):
        verify_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program"):
        verify_checkpoint(tmp_path / "absent")


def test_a_base_loaded_from_elsewhere_or_in_bfloat16_is_recognised(base: Path, saved: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    policy = load_policy(moved)
    for parameter in policy.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert load_checkpoint(saved, policy).step == 2


def test_weights_trained_outside_the_adapter_are_not_silently_left_out(
    base: Path, trained: Trained, tmp_path: Path
) -> None:
    policy = load_policy(base)
    policy.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match="not exactly the adapter's"):
        save(tmp_path, base, (policy, new_optimizer(policy)), 1)
    assert not list((tmp_path / "checkpoints").glob("*"))
