"""The benchmarks of the engine run, at sizes that say nothing about speed; the one that needs TRL says so."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Shown = Callable[..., str]
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ["--set", "placement.threads=1", "--set", "models.image.steps=1", "--set", "models.image.resolution=96"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """``shown("scaling", "--rounds", "1")``: what a benchmark prints, run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        return capsys.readouterr().out

    return run


def test_sharing_the_prompt_reads_the_tokens_that_were_promised(shown: Shown) -> None:
    out = shown("policy_tokens", "--rounds", "1", "--rollouts", "2", "4", *SMALL)
    rows = [line.split() for line in out.splitlines() if re.match(r"\s*[24] +\d+ +\d+", line)]
    assert [row[0] for row in rows] == ["2", "4"]
    for _, promised, shared, apart, *_, difference in rows:
        assert promised == shared
        assert int(apart) > int(shared)
        assert float(difference) < 1e-4


def test_the_growth_of_every_kind_is_measured(shown: Shown) -> None:
    out = shown("scaling", "--rounds", "1", "--sizes", "1", *SMALL)
    for row in ("4 rollouts", "2 prompts", "16 tokens"):
        assert re.search(rf"^{row} +\d", out, re.MULTILINE)
    memory = out.splitlines()[-1].split()
    assert memory[:2] == ["4", "64"]
    assert float(memory[2]) > 0 and float(memory[3]) > 0  # how they compare is no matter of so small a run


def test_how_far_noise_moves_a_policy_is_measured_in_pairs(shown: Shown) -> None:
    few = ["training.steps=2", "training.batch_size=2", "sampling.num_rollouts=3", "evaluation.prompts=3"]
    out = shown("drift", "--seeds", "2", *SMALL, *(part for setting in few for part in ("--set", setting)))
    rows = [line.split() for line in out.splitlines() if re.match(r"\s*[01] ", line)]
    assert [len(row) for row in rows] == [5, 5]
    assert any(float(cell) for row in rows for cell in row[1:]), "a policy that learns from noise moves"
    assert re.search(r"^sampled: a single run drifts by \d", out, re.MULTILINE)


def test_the_full_scale_is_built_and_measured_phase_by_phase(shown: Shown) -> None:
    few = ["--set", "training.batch_size=2", "--set", "sampling.num_rollouts=2", "--set", "sampling.max_new_tokens=4"]
    out = shown("full_scale", "--small", "--device", "cpu", "--denoising", "1", "--steps", "1", "--t5", *few)
    rows = {row[2]: row for row in map(str.split, out.splitlines()) if row[:2] == ["1", "steps"] and len(row) > 4}
    assert list(rows) == ["sample", "render", "score", "update", "whole"]
    for phase in ("sample", "render", "score", "update"):
        assert float(rows[phase][3]) > 0 and float(rows[phase][5]) > 0  # seconds, and a share of the matrix rate


def test_without_trl_one_sentence_says_how_to_install_it(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed, whether it is or not
    with pytest.raises(SystemExit, match="TRL, which is not installed.*pip install -r benchmarks/requirements.txt"):
        shown("vs_trl", "--pairs", "1")
    wanted = (FOLDER / "requirements.txt").read_text()
    assert re.search(r"^trl==", wanted, re.MULTILINE)
