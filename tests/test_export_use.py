"""What a stranger does with an export of the embedded models: the lines of the README and of the model card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_policy import new_optimizer

from grpo_engine.checkpoint import CheckpointError, save_checkpoint
from grpo_engine.config import ROOT
from grpo_engine.environment import parse_rewrite
from grpo_engine.export import export
from grpo_engine.loading import load_policy
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.seeding import normals
from tests.conftest import run_config

README_PROMPT, CARD_PROMPT = "a large red ring", "a red cube on a green table"


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def python_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PureGRPOPolicy, Path]:
    """The embedded policy with an adapter that says something, and the folder of a run that saved it."""
    torch.set_num_threads(1)
    config, run = run_config("sampling.max_new_tokens=28"), tmp_path_factory.mktemp("run")
    policy = load_policy(config, torch.device("cpu"))
    with torch.no_grad():
        for index, parameter in enumerate(policy.trainable().values()):
            parameter += 0.08 * normals(index, parameter.shape)
    optimizer = new_optimizer(policy)  # type: ignore[arg-type]
    save_checkpoint(run, policy=policy, optimizer=optimizer, step=1, config=config, metrics={})
    return policy, run


def greedy(policy: PureGRPOPolicy, prompt: str) -> str | None:
    return parse_rewrite(policy.sample([prompt], [[0]], greedy=True)[0].texts[0])


def test_the_readme_puts_the_rewriter_in_front_of_a_pipeline(
    trained: tuple[PureGRPOPolicy, Path], tmp_path: Path
) -> None:
    policy, run = trained
    export(run, tmp_path / "rewriter")
    (tmp_path / "grpo_engine").symlink_to(ROOT / "grpo_engine")
    (code,) = python_in((ROOT / "README.md").read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    with working_in(tmp_path):
        exec(code, space)
    assert space["rewrite"](README_PROMPT) == greedy(policy, README_PROMPT)
    with policy.reference():
        assert space["rewrite"](README_PROMPT) != greedy(policy, README_PROMPT), "the adapter must be at work"
    assert space["image"].size == (96, 96) and len(set(space["image"].convert("L").tobytes())) > 1


@pytest.mark.parametrize("format", ["peft", "pth"])
def test_an_export_of_the_embedded_policy_brings_its_base_along(
    trained: tuple[PureGRPOPolicy, Path], tmp_path: Path, format: Any
) -> None:
    policy, run = trained
    target = export(run, tmp_path / "out", format=format)
    (code,) = python_in((target / "README.md").read_text(encoding="utf-8"))
    asked: list[str] = []

    def pipeline(prompt: str) -> Any:
        asked.append(prompt)
        return type("Output", (), {"images": [None]})

    moved = target.rename(tmp_path / "elsewhere")
    with working_in(moved):
        exec(code, {"pipeline": pipeline})
    assert asked == [greedy(policy, CARD_PROMPT)]
    for file in moved.rglob("*"):
        assert file.is_dir() or str(ROOT).encode() not in file.read_bytes(), file.name


def test_an_embedded_base_that_is_not_the_trained_one_is_refused(
    trained: tuple[PureGRPOPolicy, Path], tmp_path: Path
) -> None:
    _, run = trained
    other = load_policy(run_config(), torch.device("cpu"))
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(CheckpointError, match="trained on other embedded models"):
        export(run, tmp_path / "out", policy=other)
    assert not (tmp_path / "out").exists()
