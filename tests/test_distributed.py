"""Ranks: several processes are one run. Real processes over gloo, launched as the README says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from engine_runs import StopAtPoll, flags, small, wait_until
from rank_runs import ACCELERATE, SETTINGS, TORCHRUN, Done, assert_alike, carry, play, start

from grpo_engine.config import ROOT, ConfigError
from grpo_engine.distributed import ALONE, World
from grpo_engine.manager import execute
from grpo_engine.model_sizes import policy_size
from grpo_engine.plan import Plan
from grpo_engine.store import Store
from grpo_engine.store.rows import RunRow

# -- what ranks do together, without models ------------------------------------------------------------------


def test_ranks_share_sum_decide_and_gather() -> None:
    outcome = play("together", size=3)
    assert outcome.codes == [0, 0, 0]
    ranks = outcome.found["ranks"]
    for rank in ranks:
        assert rank["weights"] == ranks[0]["weights"], "all begin from the first rank's"
        assert rank["weights"][0] == [1.0, 2.0]
        assert rank["moment"] == ranks[0]["moment"] == pytest.approx([1.0, 0.1])
        assert rank["gradients"] == [[3.0, 3.0], [6.0, 6.0], None]
        assert rank["decided"] == "by rank 0"
        assert rank["figures"] == {"loss": 3.0, "error": 2.0}
        assert rank["refused"] == "On rank 1 of 3: this machine has no such folder."
    assert [rank["shares"] for rank in ranks] == [
        [[0, 1], [0, 1], []],
        [[2, 3], [2, 3], [0]],
        [[4, 5], [4, 5, 6], [1]],
    ]
    assert [rank["collected"] for rank in ranks] == [[0, 1, 1, 2, 2, 2], [1, 1], [2, 2, 2]]


@pytest.mark.parametrize("scenario", ["death", "death_in_exchange"])
def test_the_death_of_a_rank_is_noticed_without_a_launcher(scenario: str) -> None:
    outcome = play(scenario)
    assert outcome.codes == [0, -signal.SIGKILL]
    assert outcome.found["raised"] == "RankLost"
    assert re.fullmatch(
        r"Rank 1 of 2 \(process \d+ on .+\) died: no sign of life for \d+ seconds; resume the run\.",
        outcome.found["said"],
    )
    assert outcome.found["seconds"] < 40


def test_a_rank_that_cannot_hear_of_a_loss_is_ended_after_it_is_recorded() -> None:
    outcome = play("stuck")
    assert outcome.codes == [1, -signal.SIGKILL]
    assert "died" in outcome.found["stuck"]


def test_a_rank_that_fails_tells_the_first_one_why() -> None:
    outcome = play("failure")
    assert outcome.codes == [0, 1]
    assert outcome.found["said"].startswith("Rank 1 of 2 (process ")
    assert outcome.found["said"].endswith(") failed: OutOfMemoryError: no room left.")


def test_a_signal_to_any_rank_stops_the_run_and_no_rank_is_left_waiting() -> None:
    outcome = play("stop")
    assert outcome.codes == [0, 0]
    assert outcome.found["raised"] == "StopRequested"


def test_a_step_that_ranks_cannot_share_evenly_is_refused() -> None:
    world = World()
    world.size = 2
    with pytest.raises(ConfigError) as caught:
        Plan(small("training.batch_size=3"), world)
    assert str(caught.value) == (
        "training.batch_size is 3, but 2 ranks share a step in whole groups; set it to a multiple of 2, "
        "or start another number of ranks."
    )


def test_ranks_on_one_machine_plan_with_their_share_of_its_memory_and_of_a_step() -> None:
    world = World()
    world.size = world.local_size = 2
    config = small("training.batch_size=4", "training.minibatches=4", "models.image.batch_size=0")
    shared, alone = Plan(config, world), Plan(config)
    assert shared.config.training == alone.config.training == config.training
    (cpu,), (whole,) = shared.memory.devices, alone.memory.devices
    assert cpu.memory is not None
    assert whole.memory is not None
    assert cpu.memory.total == whole.memory.total // 2
    assert shared.memory.image_batch == 2 * 3, "pictures of two groups"
    assert alone.memory.image_batch == 4 * 3


def test_a_single_rank_owns_everything() -> None:
    assert list(ALONE.share(range(3))) == [0, 1, 2]
    assert ALONE.gather("x") == ["x"]
    assert (ALONE.first, ALONE.collect([1, 2]), ALONE.decide(lambda: 5)) == (True, [1, 2], 5)


# -- whole runs ----------------------------------------------------------------------------------------------

SHARED = "placement.shard_policy=true"
DIED = r"Rank 1 of 2 \(process \d+ on .+\) died: no sign of life for \d+ seconds; resume the run\."


def kill_second_rank(launcher: subprocess.Popen[str]) -> None:
    """As a machine that fails would."""
    ranks = psutil.Process(launcher.pid).children()
    (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
    victim.kill()


def lose_a_rank(store: Store, *overrides: str, after: int = 1) -> tuple[RunRow, int]:
    """A run on two ranks, the second killed after step ``after``: how it failed, and its launcher's exit code."""
    with start(TORCHRUN, "train", "--db", store.path, *flags(*overrides)) as launcher:
        try:
            wait_until(lambda: any(run.step >= after for run in store.runs()), 250)
            kill_second_rank(launcher)
            killed = time.monotonic()
            wait_until(lambda: store.runs()[0].state == "failed")
            assert time.monotonic() - killed < 60
            launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    (run,) = store.runs()
    assert re.fullmatch(DIED, run.error or "")
    return run, launcher.returncode


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """The run in one process."""
    with Store(tmp_path_factory.mktemp("single") / "runs.db") as store:
        run_id = store.create_run(small(*SETTINGS))
        assert execute(store, run_id) == "finished", store.run(run_id).error
        yield Done(store, run_id)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_make_the_run_that_one_process_makes(single: Done, tmp_path: Path) -> None:
    code, output = carry(TORCHRUN, "train", "--db", tmp_path / "runs.db", *flags(*SETTINGS))
    assert code == 0, output
    with Store(tmp_path / "runs.db") as store:
        (run,) = store.runs()
        assert_alike(single, Done(store, run.id))
        figures = store.steps(run.id, ["resampled_groups", "zero_spread_share"])
        assert figures["resampled_groups"].sum() > 0
        assert figures["zero_spread_share"].mean() < 1, "else nothing was learned"
        placed = [event.message for event in store.events(run.id, limit=None) if event.kind == "placement"]
        assert [text[:7] for text in placed] == ["rank 0:", "rank 1:"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stopped_in_one_process_goes_on_in_two(single: Done, tmp_path: Path) -> None:
    class StopAtStep(StopAtPoll):
        def poll(self) -> None:
            if store.run(run_id).step == 1:
                self.command("stop")
            super().poll()

    with Store(tmp_path / "runs.db") as store:
        run_id = store.create_run(small(*SETTINGS))
        assert execute(store, run_id, StopAtStep()) == "stopped"
        code, output = carry(ACCELERATE, "resume", run_id, "--db", store.path)
        assert code == 0, output
        assert store.run(run_id).resumed_count == 1
        assert_alike(single, Done(store, run_id))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_rank_is_killed_fails_in_a_sentence_and_goes_on_in_one_process(
    single: Done, tmp_path: Path
) -> None:
    with Store(tmp_path / "runs.db") as store:
        run, code = lose_a_rank(store, *SETTINGS)
        assert code != 0
        assert execute(store, run.id) == "finished"
        assert_alike(single, Done(store, run.id))


# -- a policy whose weights are shared out --------------------------------------------------------------------


def test_ranks_with_a_share_each_compute_what_a_whole_policy_does() -> None:
    """Though they sample rewrites of different lengths, learn from different numbers of groups, and one is asked."""
    outcome = play("shares")
    assert outcome.codes == [0, 0]
    ranks = outcome.found["ranks"]
    config = small().models.policy
    size = policy_size(config.path)
    assert size is not None
    for rank in ranks:
        assert rank["bytes"] == rank["whole_bytes"] - 4 * size.packable // 2, "half of every layer's matrices"
        assert rank["lengths"] == [[10, 10], [1]]
        assert rank["same_samples"]
        assert rank["same_gradients"]
        assert rank["same_fingerprint"]
    assert [rank["learned_from"] for rank in ranks] == [2, 0]
    assert ranks[0]["gradient"] > 0
    assert ranks[1]["gradient"] is None, "empty passes leave no gradient"
    assert ranks[1]["answers"] == ranks[1]["whole_answers"]


def test_ranks_train_their_shares_of_all_weights_as_one_does_the_whole() -> None:
    outcome = play("trained_shares")
    assert outcome.codes == [0, 0]
    size = policy_size(small().models.policy.path)
    assert size is not None
    for rank in outcome.found["ranks"]:
        assert rank["bytes"] == rank["whole_bytes"] - 4 * size.packable // 2
        assert rank["shared"] == 7 * size.layers
        shared, whole = rank["norms"][::2], rank["norms"][1::2]
        assert shared == pytest.approx(whole, rel=1e-5)
        assert min(whole) > 0.5, "else nothing is clipped"
        assert max(rank["far"].values()) < 1e-4


def test_no_rank_exchanges_anything_before_the_others_have_come_to_it() -> None:
    outcome = play("turns", size=3)
    assert outcome.codes == [0, 0, 0]
    made = outcome.found["ranks"]
    assert [rank["own"] for rank in made] == [["learn", "forward"], ["forward", "forward", "forward"], []]
    assert made[0]["passes"] == made[1]["passes"] == made[2]["passes"], "all passes are made by all, in one order"
    assert made[0]["passes"].count("learn") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_shares_whose_rank_is_killed_fails_in_a_sentence_and_goes_on_in_one_process(
    single: Done, tmp_path: Path
) -> None:
    with Store(tmp_path / "runs.db") as store:
        run, _ = lose_a_rank(store, *SETTINGS, SHARED, after=2)
        (told,) = [event.message for event in store.events(run.id, limit=None) if event.kind == "sharding"]
        here, whole = (float(number) for number in re.findall(r"[\d.]+\d", told))
        assert here < whole
        assert execute(store, run.id) == "finished", store.run(run.id).error
        assert_alike(single, Done(store, run.id))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_weights_are_trained_in_shares_as_in_one_process_and_through_a_stop(tmp_path: Path) -> None:
    settings = (*SETTINGS, "models.policy.adapter=full", "training.learning_rate=1e-6", "evaluation.greedy=false")
    with Store(tmp_path / "runs.db") as store:
        one = store.create_run(small(*settings))
        assert execute(store, one) == "finished", store.run(one).error
        with start(TORCHRUN, "train", "--db", store.path, *flags(*settings, SHARED)) as launcher:
            try:
                wait_until(lambda: any(run.step for run in store.runs() if run.id != one), 250)
                launcher.send_signal(signal.SIGINT)
                output, _ = launcher.communicate(timeout=100)
            finally:
                launcher.kill()
        (run,) = [run for run in store.runs() if run.id != one]
        assert run.state == "stopped", output
        code, output = carry(TORCHRUN, "resume", run.id, "--db", store.path)
        assert code == 0, output
        assert_alike(Done(store, one), Done(store, run.id))


def test_a_single_rank_that_shall_share_its_policy_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError) as caught:
        Plan(small(SHARED))
    assert str(caught.value) == (
        "placement.shard_policy is true, but a single rank has nobody to share its policy with; start several with "
        "'torchrun --nproc-per-node 2 -m grpo_engine train', or set it to false."
    )
    assert Plan(small(SHARED), whole=True).memory.fits, "what several ranks began, one may go on with"


# -- files for clusters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two-cells", "multi-node"])
def test_accelerate_reads_its_configuration(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert str(config.distributed_type.value) == "MULTI_GPU"
    text = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config.num_processes == text["num_processes"] == (2 if name == "two-cells" else 4)
    assert config.num_machines == (1 if name == "two-cells" else 2)


@pytest.mark.parametrize("script", sorted((ROOT / "configs" / "slurm").glob("*.slurm")), ids=lambda path: path.name)
def test_a_batch_script_is_valid_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.slow
def test_the_multi_node_script_starts_every_rank(tmp_path: Path) -> None:
    """On one node, with commands of SLURM's names that do what it would do there."""
    for name, action in (("srun", 'exec "$@"'), ("scontrol", "echo localhost"), ("python3", f'{sys.executable} "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{action}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        ["bash", "configs/slurm/train-multinode.slurm", *flags(*SETTINGS), "--check"],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GRPO_CONFIG": "tiny", "RANKS": "2", "OMP_NUM_THREADS": "1"}
        | {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The settings are fine: policy on cpu") == 1, "only the first rank speaks"
