"""The playground: what it draws is what a run would draw, and no run ever notices it."""

from __future__ import annotations

import hashlib
import io
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import assert_same_steps, create, recorded, saved, small, wait_until
from PIL import Image
from torch import Tensor

from grpo_engine.checkpoint import load_checkpoint
from grpo_engine.config import RunConfig
from grpo_engine.control import StopRequested
from grpo_engine.environment import parse_rewrite
from grpo_engine.evaluation import Evaluator
from grpo_engine.judge import CheckerJudge, VqaJudge
from grpo_engine.loading import load_environment, load_policy, read_prompts
from grpo_engine.manager import RunManager, execute
from grpo_engine.placement import intended
from grpo_engine.playground import MOST_WAITING, Playground
from grpo_engine.playground_models import PlaygroundModels, _refuse_crowding, latent_seeds
from grpo_engine.playground_try import (
    Column,
    PlaygroundBusy,
    PlaygroundCrowded,
    PlaygroundError,
    Try,
    saved_checkpoints,
    tidy_prompt,
)
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.rollout import Picture
from grpo_engine.store import Store

PROMPT = "a ruby disc on a grey backdrop"
LATENT, SAMPLE = 2**62 + 11, 5
ORIGINAL, UNTRAINED = Column("original"), Column("untrained")
CPU = torch.device("cpu")


@dataclass
class Recorded:
    """A short finished run whose two checkpoints, of steps 2 and 3, write otherwise than the untrained policy."""

    store: Store
    run_id: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.store.run_dir(self.run_id)

    def column(self, which: Any = "last") -> Column:
        return Column("checkpoint", settings=plain(self.config), folder=str(self.folder), which=which)

    def asked(self, *columns: Column, **changes: Any) -> Try:
        return Try(PROMPT, plain(self.config), columns, latent_seed=LATENT, sample_seed=SAMPLE, **changes)


@dataclass
class Made:
    """Everything a try told, by column."""

    columns: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def text(self, index: int) -> str | None:
        text: str | None = self.columns[index]["text"]
        return text

    def pictures(self, index: int) -> list[bytes]:
        return [picture["png"] for _, picture in sorted(self.columns[index]["pictures"].items())]

    def figures(self, index: int, name: str) -> list[float]:
        return [picture[name] for _, picture in sorted(self.columns[index]["pictures"].items())]


def plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def make(models: PlaygroundModels, asked: Try) -> Made:
    made = Made([{"pictures": {}} for _ in asked.columns])

    def told(kind: str, **data: Any) -> None:
        if kind == "facts":
            made.facts |= data
        elif kind == "column":
            made.columns[data.pop("index")] |= data
        elif kind == "picture":
            made.columns[data["index"]]["pictures"][data["k"]] = data

    models.carry_out(asked, told)
    return made


def pixels(png: bytes) -> Picture:
    return np.asarray(Image.open(io.BytesIO(png)))


def finished(playground: Playground, job: str) -> dict[str, Any]:
    wait_until(lambda: playground.job(job)["state"] not in ("waiting", "working"), 120)
    return playground.job(job)


def wait_for_phase(playground: Playground, job: str, phase: str) -> None:
    wait_until(lambda: playground.job(job)["phase"] == phase, 120)


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below ``folder``, and when it was last written."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(database: Path) -> list[str]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return list(connection.iterdump())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    config = small("training.learning_rate=0.1", "recording.keep_checkpoints=3")
    with Store(tmp_path_factory.mktemp("played") / "runs.db") as store:
        run_id = create(store, config)
        assert execute(store, run_id) == "finished", store.run(run_id).error
        yield Recorded(store, run_id, config)


@pytest.fixture(scope="module")
def models() -> PlaygroundModels:
    """The playground's models in this process; a try may leave any checkpoint in them, and must not mind any."""
    torch.set_num_threads(1)
    return PlaygroundModels()


@pytest.fixture(scope="module")
def playground(run: Recorded) -> Iterator[Playground]:
    made = Playground(run.store)
    yield made
    made.close()


# -- what is drawn -----------------------------------------------------------------------------------------


def test_an_unrewritten_prompt_gives_the_very_picture_that_an_evaluation_draws_and_scores(
    run: Recorded, models: PlaygroundModels
) -> None:
    environment = load_environment(run.config)
    evaluator = Evaluator(environment, None, read_prompts(run.config).split("test")[:1], run.config)
    (item,) = evaluator.measure("original")
    made = make(models, replace(run.asked(ORIGINAL), prompt=item.prompt, latent_seed=item.latent_seed))
    assert item.picture is not None
    np.testing.assert_array_equal(pixels(made.pictures(0)[0]), item.picture)
    assert made.figures(0, "clip") == [item.score.parts["clip"]]


def test_each_policy_writes_what_it_writes_elsewhere_with_the_same_seed_in_whatever_order_they_are_asked(
    run: Recorded, models: PlaygroundModels
) -> None:
    policy = load_policy(run.config, CPU)

    def expected() -> str | None:
        return parse_rewrite(policy.sample([PROMPT], [[SAMPLE]])[0].texts[0])

    with policy.reference():
        untrained = expected()
    load_checkpoint(run.folder / "checkpoints" / "step-000002", policy)
    second = expected()
    load_checkpoint(run.folder / "checkpoints" / "step-000003", policy)
    last = expected()
    assert len({untrained, second, last}) == 3, "the checkpoints must differ for this test to mean something"
    made = make(models, run.asked(run.column(2), UNTRAINED, run.column("last"), UNTRAINED, run.column(2)))
    assert [made.text(index) for index in range(5)] == [second, untrained, last, untrained, second]
    assert [made.columns[index].get("step") for index in range(5)] == [2, None, 3, None, 2]


def test_the_likeliest_rewrite_depends_on_no_seed_and_a_sampled_one_on_its_own(
    run: Recorded, models: PlaygroundModels
) -> None:
    likeliest = {
        make(models, run.asked(UNTRAINED, greedy=True)).text(0),
        make(models, replace(run.asked(UNTRAINED, greedy=True), sample_seed=99)).text(0),
    }
    sampled = {make(models, replace(run.asked(UNTRAINED), sample_seed=seed)).text(0) for seed in range(4)}
    assert len(likeliest) == 1
    assert len(sampled) > 1


def test_a_temperature_close_to_zero_gives_the_likeliest_rewrite_and_is_forgotten_afterwards(
    run: Recorded, models: PlaygroundModels
) -> None:
    usual = make(models, run.asked(run.column())).text(0)
    cold = make(models, run.asked(run.column(), temperature=0.01)).text(0)
    assert cold == make(models, run.asked(run.column(), greedy=True)).text(0)
    assert make(models, run.asked(run.column())).text(0) == usual


def test_a_picture_is_the_same_alone_beside_others_and_by_hand(run: Recorded, models: PlaygroundModels) -> None:
    together = make(models, run.asked(UNTRAINED, ORIGINAL, run.column(), pictures=3))
    alone = make(models, run.asked(ORIGINAL, pictures=3))
    by_hand = make(models, run.asked(Column("edited", text=PROMPT), pictures=2))
    assert together.pictures(1) == alone.pictures(0)
    assert by_hand.pictures(0) == alone.pictures(0)[:2]
    assert len(set(alone.pictures(0))) == 3, "the latents of a column differ"
    assert latent_seeds(run.asked(ORIGINAL, pictures=3))[0] == LATENT
    assert together.facts["latents"] == [str(seed) for seed in latent_seeds(run.asked(ORIGINAL, pictures=3))]


def test_a_rewrite_by_hand_is_scored_against_the_prompt_not_against_itself(
    run: Recorded, models: PlaygroundModels
) -> None:
    text = "a small green star"
    made = make(models, run.asked(Column("edited", text=text)))
    environment = load_environment(run.config)
    picture = pixels(made.pictures(0)[0])
    (against_prompt,) = environment.reward.score([picture], [PROMPT], [text])
    (against_itself,) = environment.reward.score([picture], [text], [text])
    assert made.figures(0, "clip") == [against_prompt.parts["clip"]]
    assert against_prompt.parts["clip"] != pytest.approx(against_itself.parts["clip"], abs=1)


def test_the_end_of_a_text_that_the_image_model_does_not_read_is_told(run: Recorded, models: PlaygroundModels) -> None:
    text = " ".join(["red"] * 40)
    made = make(models, run.asked(Column("edited", text="a red star"), Column("edited", text=text)))
    assert {"cut", "unread"}.isdisjoint(made.columns[0])
    cut, unread = made.columns[1]["cut"], made.columns[1]["unread"]
    assert cut > 0
    assert unread.split() == ["red"] * cut and text.endswith(unread), "a token a word"


def test_the_checker_judges_a_prompt_it_can_check_and_the_untrained_policy_any_other(
    run: Recorded, models: PlaygroundModels
) -> None:
    prompt = read_prompts(run.config).split("test")[0]
    known = replace(run.asked(ORIGINAL, run.column()), prompt=prompt.text, request=prompt.meta["request"])
    checked = make(models, known)
    assert checked.facts["judge"] == "checker"
    (expected,) = CheckerJudge().judge([pixels(checked.pictures(0)[0])], [prompt])
    assert checked.figures(0, "judge") == [expected.score]

    free = make(models, replace(known, request=None))
    assert free.facts["judge"] == "vqa"
    (expected,) = VqaJudge(load_policy(run.config, CPU)).judge([pixels(free.pictures(0)[0])], [prompt])
    assert free.figures(0, "judge") == [pytest.approx(expected.score, rel=1e-5)]  # with a trained adapter loaded

    silent = make(models, replace(known, settings=plain(small("evaluation.judge=none"))))
    assert silent.facts["judge"] == "none"
    assert silent.figures(0, "judge") == [None]


def test_checkpoints_of_another_adapter_shape_stand_beside_each_other(
    run: Recorded, models: PlaygroundModels, tmp_path: Path
) -> None:
    config = small("training.steps=1", "models.policy.lora.rank=4", "training.learning_rate=0.1")
    with Store(tmp_path / "runs.db") as store:
        other = Recorded(store, create(store, config), config)
        assert execute(store, other.run_id) == "finished"
        made = make(models, run.asked(run.column(), other.column(), UNTRAINED))
    policy = load_policy(config, CPU)
    load_checkpoint(other.folder / "checkpoints" / "step-000001", policy)
    assert made.text(1) == parse_rewrite(policy.sample([PROMPT], [[SAMPLE]])[0].texts[0])
    assert make(models, run.asked(run.column(), UNTRAINED)).text(0) == made.text(0)


# -- what can't be drawn -----------------------------------------------------------------------------------


def test_what_a_policy_writes_in_vain_is_shown_and_nothing_is_drawn_for_it(
    run: Recorded,
    models: PlaygroundModels,
    biased: Callable[[PureGRPOPolicy, Callable[[Tensor], Tensor]], AbstractContextManager[None]],
) -> None:
    make(models, run.asked(UNTRAINED))
    assert models._policy is not None
    policy = models._policy[1]

    def end_at_once(logits: Tensor) -> Tensor:
        return torch.full_like(logits, -50.0).index_fill(1, torch.tensor(policy.end_tokens), 50.0)

    silent = run.asked(ORIGINAL, UNTRAINED)
    with biased(policy, end_at_once):
        made = make(models, replace(silent, settings=plain(small("evaluation.judge=none"))))
    assert made.columns[1] == {"pictures": {}, "text": None, "completion": "", "finished": True}
    assert len(made.pictures(0)) == 1


def test_a_missing_or_damaged_checkpoint_is_named_in_its_column_and_the_others_are_drawn(
    run: Recorded, models: PlaygroundModels, tmp_path: Path
) -> None:
    copy = tmp_path / "0009-copy-aaaa"
    shutil.copytree(run.folder, copy)
    weights = copy / "checkpoints" / "step-000003" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    of_copy = [replace(run.column(which), folder=str(copy)) for which in (3, "last", 7)]
    odd = replace(run.column(), settings={"models": {"policy": {"no_such_setting": 1}}})
    made = make(models, run.asked(ORIGINAL, *of_copy, odd))
    assert made.columns[1]["error"].startswith("The checkpoint step-000003 is damaged: adapter_model.safetensors ")
    assert made.columns[2]["step"] == 2  # the last that is intact, and it says so
    assert "is used instead" in made.columns[2]["note"]
    assert made.columns[3]["error"] == "This run has no checkpoint of step 7; choose one of 2, 3."
    assert str(tmp_path) not in str(made.columns)
    assert "There is no setting" in made.columns[4]["error"]
    assert [len(made.pictures(index)) for index in range(5)] == [1, 0, 1, 0, 0]


def test_a_run_of_another_policy_model_is_refused_in_its_column(run: Recorded, models: PlaygroundModels) -> None:
    foreign = plain(run.config)
    foreign["models"]["policy"]["path"] = "somebody/another-model"
    made = make(models, run.asked(ORIGINAL, replace(run.column(), settings=foreign)))
    assert "somebody/another-model" in made.columns[1]["error"]
    assert "choose this run's models" in made.columns[1]["error"]
    assert len(made.pictures(0)) == 1


def test_a_prompt_that_the_reward_would_cut_is_refused_before_any_model_loads(run: Recorded) -> None:
    fresh = PlaygroundModels()
    with pytest.raises(PlaygroundError, match=r"The prompt has \d+ tokens, but the reward reads only \d+") as refused:
        make(fresh, replace(run.asked(ORIGINAL), prompt="a red disc " * 40))
    assert refused.value.field == "prompt"
    assert fresh._painter is None


def test_markup_of_the_policys_chat_stops_the_policies_only(run: Recorded, models: PlaygroundModels) -> None:
    special = load_policy(run.config, CPU).tokenizer.all_special_tokens[0]
    made = make(models, replace(run.asked(ORIGINAL, UNTRAINED), prompt=f"a disc {special}"))
    assert "markup" in made.columns[1]["error"]
    assert len(made.pictures(0)) == 1


def test_a_model_that_is_not_there_is_one_sentence(run: Recorded, models: PlaygroundModels, tmp_path: Path) -> None:
    settings = plain(run.config)
    settings["models"]["image"]["path"] = str(tmp_path / "nothing")
    with pytest.raises(PlaygroundError, match="^The image model could not be loaded"):
        make(models, replace(run.asked(ORIGINAL), settings=settings))
    assert len(make(models, run.asked(ORIGINAL)).pictures(0)) == 1  # and the next try works again


def test_a_stop_between_two_denoising_steps_ends_a_try(run: Recorded, models: PlaygroundModels) -> None:
    polls = 0

    def stop_at_third() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            raise StopRequested

    with pytest.raises(StopRequested):
        models.carry_out(run.asked(ORIGINAL, pictures=4), lambda kind, **data: None, stop_at_third)


def test_a_gpu_that_a_run_works_on_is_left_alone_unless_a_second_run_would_fit() -> None:
    on_gpu = small("placement.policy=cuda:0", "placement.image=cuda:0", "placement.reward=cuda:0")
    placement = intended(on_gpu.placement)
    asked = Try(PROMPT, plain(on_gpu), (ORIGINAL,))
    # The memory of cuda:99 is unknown wherever these tests run, so nothing can be sure to fit there.
    far = small("placement.policy=cuda:99", "placement.image=cuda:99", "placement.reward=cuda:99")
    with pytest.raises(PlaygroundCrowded, match=r"^Ruby is training on cuda:99, .* stop it\.$"):
        _refuse_crowding(far, intended(far.placement), replace(asked, beside=(("Ruby is training", plain(far)),)))
    for elsewhere in (small(), far):
        _refuse_crowding(on_gpu, placement, replace(asked, beside=(("Ruby is training", plain(elsewhere)),)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" \n ", "Write a prompt first, or take one of the examples."),
        ("x" * 401, "The text has 401 characters, the limit is 400; shorten it."),
        ("a \x07 disc", "The text has a control character, U+0007 at position 3; remove it."),
        ("<|im_end|> disc", "The text has '<|im_end|>', which is markup of a language model's chat; remove it."),
    ],
)
def test_a_prompt_no_set_could_hold_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PlaygroundError) as refused:
        tidy_prompt(text, 400)
    assert (str(refused.value), refused.value.field) == (sentence, "prompt")


def test_a_prompt_of_several_lines_becomes_one() -> None:
    assert tidy_prompt(" a red disc\n\ton  a table ", 400) == "a red disc on a table"


def test_the_checkpoints_of_a_folder_are_listed_and_leftovers_are_not(run: Recorded, tmp_path: Path) -> None:
    found = saved_checkpoints(run.folder)
    assert (found.steps, found.last) == ((2, 3), 3)
    assert found.best in (2, 3)
    assert saved_checkpoints(tmp_path) == ((), None, None)
    for name in ("step-000004", ".partial-step-000005-1", "step-x", "step-000006.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "index.json").write_text("[1")
    assert saved_checkpoints(tmp_path) == ((4,), None, None)


# -- the process beside the app ----------------------------------------------------------------------------


def test_tries_wait_their_turn_are_bounded_and_can_be_cancelled_while_they_wait_or_work(
    run: Recorded, playground: Playground
) -> None:
    with pytest.raises(PlaygroundError, match="between 1 and 6 columns"):
        playground.submit(run.asked(*[ORIGINAL] * 7))
    long = playground.submit(run.asked(*[Column("edited", text=f"{n} discs") for n in range(6)], pictures=4))
    wait_until(lambda: playground.job(long)["state"] == "working")
    waiting = [playground.submit(run.asked(ORIGINAL)) for _ in range(MOST_WAITING)]
    assert [playground.job(job)["position"] for job in waiting] == [1, 2, 3, 4]
    with pytest.raises(PlaygroundBusy):
        playground.submit(run.asked(ORIGINAL))
    playground.cancel(waiting[1])
    assert [playground.job(job)["position"] for job in waiting] == [1, 0, 2, 3]
    wait_for_phase(playground, long, "rendering")
    playground.cancel(long)
    assert playground.job(long)["state"] == "cancelled"
    assert [finished(playground, job)["state"] for job in waiting] == ["done", "cancelled", "done", "done"]
    assert None in [picture for column in playground.job(long)["columns"] for picture in column["pictures"]]


def test_the_process_makes_the_pictures_that_this_one_makes(
    run: Recorded, playground: Playground, models: PlaygroundModels
) -> None:
    asked = run.asked(ORIGINAL, UNTRAINED, run.column(), pictures=2)
    job = finished(playground, playground.submit(asked))
    here = make(models, asked)
    assert job["state"] == "done", job["error"]
    for index, column in enumerate(job["columns"]):
        assert column["text"] == here.text(index)
        assert [playground.picture(picture["token"]) for picture in column["pictures"]] == here.pictures(index)
        assert [picture["clip"] for picture in column["pictures"]] == here.figures(index, "clip")
    assert playground.picture("no such token") is None


def test_a_refused_try_says_why_and_the_next_one_works(run: Recorded, playground: Playground) -> None:
    long = finished(playground, playground.submit(replace(run.asked(ORIGINAL), prompt="a red disc " * 40)))
    assert (long["state"], long["field"]) == ("failed", "prompt")
    odd = finished(playground, playground.submit(replace(run.asked(ORIGINAL), settings={"nonsense": 1})))
    assert (odd["state"], odd["error"]) == ("failed", "There is no setting 'nonsense'.")
    assert finished(playground, playground.submit(run.asked(ORIGINAL)))["state"] == "done"


def test_a_run_is_left_exactly_as_it_was(run: Recorded, playground: Playground) -> None:
    before = contents(run.folder), rows(run.store.path), run.store.revision()
    job = playground.submit(run.asked(ORIGINAL, UNTRAINED, run.column(2), run.column("best"), run.column()))
    assert finished(playground, job)["state"] == "done"
    assert (contents(run.folder), rows(run.store.path), run.store.revision()) == before


def test_a_process_that_dies_fails_its_try_and_the_next_try_gets_a_new_one(
    run: Recorded, playground: Playground
) -> None:
    job = playground.submit(run.asked(*[Column("edited", text=f"{n} discs") for n in range(6)], pictures=4))
    wait_for_phase(playground, job, "rendering")
    assert playground._child is not None
    playground._child.process.kill()
    assert "process ended" in finished(playground, job)["error"]
    assert finished(playground, playground.submit(run.asked(ORIGINAL)))["state"] == "done"


def test_models_nobody_uses_are_given_up_and_so_are_those_on_a_gpu_that_a_new_run_may_want(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as store:
        playground = Playground(store, idle_seconds=1.0)
        try:
            playground.prepare()
            wait_until(lambda: playground._child is not None)
            assert playground._child is not None
            process = playground._child.process
            wait_until(lambda: not playground.loaded)
            wait_until(lambda: not process.is_alive())

            playground.idle_seconds = 600.0
            playground.prepare()
            wait_until(lambda: playground._child is not None)
            child = playground._child
            assert child is not None
            child.devices = ["cuda:0"]  # as if its models were there
            store.set_state(create(store, small()), "loading")  # on the CPU
            time.sleep(2.5)
            assert playground.loaded
            store.set_state(create(store, RunConfig.load("tiny")), "loading")  # wherever there is room
            wait_until(lambda: not playground.loaded)
            wait_until(lambda: not child.process.is_alive())
        finally:
            playground.close()


def test_a_closed_playground_leaves_no_process_and_takes_no_more_tries(run: Recorded) -> None:
    playground = Playground(run.store)
    job = playground.submit(run.asked(ORIGINAL))
    wait_until(lambda: playground.loaded, 20)
    assert playground._child is not None
    process = playground._child.process
    playground.close()
    assert not process.is_alive()
    assert playground.job(job)["state"] == "cancelled"
    with pytest.raises(PlaygroundError, match="being closed"):
        playground.submit(run.asked(ORIGINAL))
    playground.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_trains_meanwhile_is_the_run_it_would_have_been(run: Recorded, tmp_path: Path) -> None:
    """With dropout, which draws from the global generator, and while the playground loads its models."""
    settings = ("training.steps=6", "models.policy.lora.dropout=0.2", "training.learning_rate=0.02")
    with Store(tmp_path / "runs.db") as store:
        manager = RunManager(store)
        playground = Playground(store)
        try:
            alone = manager.submit(small(*settings))
            assert manager.wait(240)
            beside = manager.submit(small(*settings))
            wait_until(lambda: store.run(beside).state != "queued")
            jobs: list[str] = []
            while not manager.wait(0.05):
                if not jobs or playground.job(jobs[-1])["state"] == "done":
                    jobs.append(playground.submit(run.asked(ORIGINAL, UNTRAINED, run.column(), pictures=2)))
            states = [playground.job(job)["state"] for job in jobs]
        finally:
            playground.close()
            manager.close()
        assert "failed" not in states
        assert {store.run(run_id).state for run_id in (alone, beside)} == {"finished"}
        assert_same_steps(recorded(store, alone), recorded(store, beside))
        assert saved(store, alone, 6) == saved(store, beside, 6)
