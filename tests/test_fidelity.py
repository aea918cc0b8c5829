"""The fidelity check: rank correlations by hand, the same pictures agree with themselves, the answer is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.__main__ import main
from grpo_engine.config import ConfigError
from grpo_engine.evaluation import bootstrap_mean
from grpo_engine.fidelity import Scores, agreement, measure_fidelity
from grpo_engine.memory import changed_settings
from grpo_engine.store import Store
from tests.engine_runs import flags, small

GROUPS = ("sampling.num_rollouts=6", "sampling.temperature=2", "training.batch_size=4")


def scores(cheap: list[float], full: list[float]) -> Scores:
    return Scores(np.array(cheap), np.array(full))


def test_the_rank_correlation_is_spearmans() -> None:
    groups = [
        scores([1.0, 2.0, 3.0, 4.0], [0.1, 7.0, 8.0, 9.0]),  # the same order
        scores([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
        scores([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]),  # 1 - 6 x 2 / (4 x 15)
    ]
    correlations, same_best = agreement(groups)
    assert correlations == pytest.approx([1.0, -1.0, 0.8])
    assert same_best.tolist() == [True, False, False]


def test_groups_without_an_order_have_no_correlation() -> None:
    unranked = [
        scores([1.0, 2.0], [1.0, 2.0]),
        scores([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        scores([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        scores([], []),
    ]
    correlations, same_best = agreement([*unranked, scores([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])])
    assert correlations.tolist() == [1.0] and same_best.tolist() == [True]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_the_interval_holds_the_mean_and_stays_among_the_values(values: list[float]) -> None:
    array = np.array(values)
    low, high = bootstrap_mean(array, resamples=400, confidence=0.99, seed=0)
    assert array.min() - 1e-9 <= low <= array.mean() + 1e-9
    assert array.mean() - 1e-9 <= high <= array.max() + 1e-9


def test_the_same_pictures_are_ranked_the_same_and_others_are_not() -> None:
    config = small(*GROUPS, "models.image.steps=2")
    heard: list[tuple[str, int, int]] = []
    alike = changed_settings(config, {"models.image.decode_batch_size": 1})
    same = measure_fidelity(config, alike, 4, told=lambda *what: heard.append(what))
    assert same.correlation > 0.99 and same.same_best == 1.0
    assert same.settings == {"models.image.decode_batch_size": (0, 1)}
    assert same.groups + same.left_out == 4
    assert ("cheap setting", 0, 4) in heard and ("full setting", 3, 4) in heard
    other = measure_fidelity(config, changed_settings(config, {"models.image.steps": 6}), 4)
    assert -1.0 <= other.low <= other.correlation <= other.high <= 1.0
    assert other.correlation < same.correlation
    assert other.cheap_seconds < other.full_seconds
    assert "With steps=2 the rewrites of a prompt are ranked as with steps=6 at a mean rank" in other.sentence


def test_settings_that_load_another_pipeline_are_compared_too(tmp_path: Path) -> None:
    config = small(*GROUPS)
    narrow = measure_fidelity(config, changed_settings(config, {"models.image.dtype": "bfloat16"}), 3)
    assert 0.5 < narrow.correlation <= 1.0


def test_what_cannot_be_compared_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(*GROUPS)
    with pytest.raises(ConfigError, match="name one that differs"):
        measure_fidelity(config, config, 4)
    for arguments, problem in (
        (["--groups", "1", "--steps", "9"], "--groups is 1"),
        (["--steps", "0"], "models.image.steps is 0"),
        (["--full", "sampling.top_k=3"], "--full takes settings of models.image"),
        (["--full", "stepz=3"], "There is no setting 'models.image.stepz'"),
        (["--run", "last", "--set", "seed=1"], "--set is for --config"),
    ):
        assert main(["fidelity", *arguments]) == 2
        assert problem in capsys.readouterr().err


def test_a_runs_fidelity_is_measured_with_its_policy_and_kept_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "runs.db")
    assert main(["train", "--db", path, *flags("training.steps=1", *GROUPS, "recording.checkpoint_every=1")]) == 0
    capsys.readouterr()
    command = ["fidelity", "--db", path, "--run", "last", "--steps", "3", "--groups", "4", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"] == {"models.image.steps": [1, 3]}
    with Store(path) as store:
        (run,) = store.runs()
        (event,) = [event for event in store.events(run.id, limit=None) if event.kind == "fidelity"]
    assert event.data == answer | {"checkpoint": "step-000001"}
    assert "With steps=1 the rewrites of a prompt are ranked as with steps=3" in event.message
