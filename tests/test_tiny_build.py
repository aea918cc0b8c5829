"""Building the embedded models: a stage goes on exactly where it stopped, and trains on what it should."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from grpo_engine.config import RunConfig
from grpo_engine.loading import load_environment
from grpo_engine.tiny import WEIGHTS, autoencoder, build, clip, diffusion, eyes, fitting, sft
from grpo_engine.tiny.autoencoder import encode_pictures, new_autoencoder, normalise_latents
from grpo_engine.tiny.captions import canonical
from grpo_engine.tiny.clip import contrast_scenes
from grpo_engine.tiny.comparing import MEANINGS, VALUES, Comparison, named, scramble, shows
from grpo_engine.tiny.corpus import Pool, build_pool, draw_scene, is_held_out, rng_for
from grpo_engine.tiny.diffusion import cached_latents, either_order
from grpo_engine.tiny.eyes import ATTRIBUTES, IGNORED, cell_labels, eyes_of
from grpo_engine.tiny.fitting import Recipe, fit
from grpo_engine.tiny.sft import (
    ASKED,
    SCRAMBLED,
    Examples,
    answer_loss,
    chat,
    compared,
    new_policy,
    new_processor,
    question_about,
)
from grpo_engine.tiny.vocabulary import DESCRIBE
from grpo_engine.tiny.world import RESOLUTION, Scene, Thing

CPU = torch.device("cpu")
RECIPE = Recipe(steps=12, batch=4, learning_rate=1e-2, warmup=3, decay_share=0.5, ema=0.8)


class Interrupted(Exception):
    """Stands for a power cut."""


@pytest.fixture(autouse=True)
def _attention_settings() -> Iterator[None]:
    """``fit`` chooses an attention kernel for the whole process; other tests shall not notice."""
    enabled = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(enabled)


def new_model() -> nn.Module:
    """Two matrices, two biases and a normalisation whose running statistics are no parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def loss_of(model: nn.Module, before: Callable[[int], None] = lambda step: None) -> Callable[[int], Tensor]:
    """Squared error on data that follow from the step; ``before(step)`` is called first."""

    def loss(step: int) -> Tensor:
        before(step)
        rng = rng_for(0, "test", step)
        inputs, targets = (torch.from_numpy(rng.standard_normal((4, n), dtype=np.float32)) for n in (3, 2))
        result: Tensor = (model(inputs) - targets).square().mean()
        return result

    return loss


def quiet(line: str) -> None:
    """No log."""


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "stage.pt", weights_only=True)
    return state


def flat(value: Any) -> list[Any]:
    """The leaves of nested dicts and lists, with their keys."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *flat(item))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def identical(left: Any, right: Any) -> bool:
    """Equal in every bit, tensors included."""
    pairs = list(zip(flat(left), flat(right), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


# -- the training loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last_saved", "interrupted"), [(0, 3), (1, 1), (5, 9), (7, 7), (11, 11)])
def test_interrupted_stage_ends_exactly_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_saved: int, interrupted: int
) -> None:
    whole = new_model()
    fit("stage", whole, loss_of(whole), RECIPE, tmp_path / "whole", log=quiet)

    def cut(step: int) -> None:
        monkeypatch.setattr(fitting, "SAVE_EVERY_SECONDS", -1.0 if step < last_saved else math.inf)
        if step == interrupted:
            raise Interrupted

    broken = new_model()
    with pytest.raises(Interrupted):
        fit("stage", broken, loss_of(broken, cut), RECIPE, tmp_path / "cut", log=quiet)
    assert (tmp_path / "cut" / "stage.pt").exists() == (last_saved > 0)
    steps: list[int] = []
    resumed = new_model()
    fit("stage", resumed, loss_of(resumed, steps.append), RECIPE, tmp_path / "cut", log=quiet)
    assert steps == list(range(last_saved, RECIPE.steps))
    assert identical(resumed.state_dict(), whole.state_dict())
    assert identical(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


def test_finished_stage_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    first = new_model()
    fit("stage", first, loss_of(first), RECIPE, tmp_path, log=quiet)
    written = (tmp_path / "stage.pt").read_bytes()

    def never(step: int) -> Tensor:
        raise AssertionError(f"step {step} was repeated")

    again = new_model()
    assert fit("stage", again, never, RECIPE, tmp_path, log=quiet) is again
    assert identical(again.state_dict(), first.state_dict())
    assert not again.training
    assert (tmp_path / "stage.pt").read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["stage.pt"]


def test_model_is_left_with_its_averaged_weights(tmp_path: Path) -> None:
    model = new_model()
    seen: list[list[Tensor]] = []  # the weights before each step
    fit(
        "stage",
        model,
        loss_of(model, lambda step: seen.append([p.detach().clone() for p in model.parameters()])),
        RECIPE,
        tmp_path,
        log=quiet,
    )
    names = [name for name, _ in model.named_parameters()]
    raw = saved(tmp_path)["model"]
    seen.append([raw[name] for name in names])
    average = [value.double() for value in seen[0]]
    for step in range(RECIPE.steps):
        keep = min(0.8, (step + 1) / (step + 10))
        average = [keep * a + (1 - keep) * p for a, p in zip(average, seen[step + 1], strict=True)]
    for param, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(p, raw[name]) for name, p in model.named_parameters())
    assert not model.training


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_step_with_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path, factor: float) -> None:
    model = new_model()
    seen: list[list[Tensor]] = []
    plain = loss_of(model, lambda step: seen.append([p.detach().clone() for p in model.parameters()]))

    def loss(step: int) -> Tensor:
        return plain(step) * (factor if step == 5 else 1.0)

    fit("stage", model, loss, RECIPE, tmp_path, log=quiet)
    assert identical(seen[5], seen[6])  # nothing moved
    assert not any(torch.equal(a, b) for a, b in zip(seen[4], seen[5], strict=True))  # as it does elsewhere
    assert not any(torch.equal(a, b) for a, b in zip(seen[6], seen[7], strict=True))
    state = saved(tmp_path)
    for value in flat([state["model"], state["average"], state["optimizer"], model.state_dict()]):
        assert not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def test_named_parts_of_a_loss_are_summed_and_logged(tmp_path: Path) -> None:
    one, two = new_model(), new_model()
    scalar, half = loss_of(one), loss_of(two)

    def parts(step: int) -> dict[str, Tensor]:
        total = half(step)
        return {"near": 0.5 * total, "far": 0.5 * total}

    lines: list[str] = []
    fit("stage", one, scalar, RECIPE, tmp_path / "one", log=quiet)
    fit("stage", two, parts, RECIPE, tmp_path / "two", log=lines.append)
    assert identical(one.state_dict(), two.state_dict())
    assert len(lines) == 1 and lines[0].startswith("stage step 0 loss ")
    assert "'near'" in lines[0] and "'far'" in lines[0]


def test_only_matrices_decay(tmp_path: Path) -> None:
    model = new_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = dataclasses.replace(RECIPE, weight_decay=0.5, learning_rate=0.1)

    def flat_loss(step: int) -> Tensor:
        return torch.stack([(0.0 * p).sum() for p in model.parameters()]).sum()

    fit("stage", model, flat_loss, recipe, tmp_path, log=quiet)
    left = math.prod(1 - 0.5 * recipe.rate(step) for step in range(recipe.steps))
    for name, value in saved(tmp_path)["model"].items():
        if name in before:
            expected = before[name] * (left if before[name].ndim == 2 else 1.0)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch=1, learning_rate=2.0, warmup=10, decay_share=0.5)
    assert recipe.rate(0) == pytest.approx(0.2)
    assert recipe.rate(4) == pytest.approx(1.0)
    assert [recipe.rate(step) for step in (9, 30, 49, 50)] == [2.0] * 4
    assert recipe.rate(75) == pytest.approx(1.0)  # half of the cosine
    assert recipe.rate(99) == pytest.approx(1.0 + math.cos(math.pi * 0.98))
    assert recipe.rate(100) == 0.0


# -- the training pictures -----------------------------------------------------------------------------------


def unreported(done: int, total: int) -> None:
    """Nobody listens."""


def same_pools(left: Pool, right: Pool) -> bool:
    return left.scenes == right.scenes and np.array_equal(left.pictures, right.pictures)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """300 pictures drawn without interruption."""
    return build_pool(tmp_path_factory.mktemp("pool"), "train", 300, 0, held_out=False, report=unreported)


def test_pool_holds_one_picture_a_scene_of_its_side_of_the_split(pool: Pool, tmp_path: Path) -> None:
    assert len(pool) == 300 and pool.pictures.shape == (300, RESOLUTION, RESOLUTION, 3)
    assert pool.pictures.dtype == np.uint8
    assert not any(is_held_out(scene) for scene in pool.scenes)
    other = build_pool(tmp_path, "held_out", 20, 0, held_out=True, report=unreported)
    assert all(is_held_out(scene) for scene in other.scenes)
    assert all(picture.std() > 0 for picture in other.pictures)


def test_pool_drawn_after_an_interruption_is_the_same(pool: Pool, tmp_path: Path) -> None:
    def cut(done: int, total: int) -> None:
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_pool(tmp_path, "train", 300, 0, held_out=False, report=cut)
    assert not (tmp_path / "train.npy").exists()
    assert same_pools(build_pool(tmp_path, "train", 300, 0, held_out=False, report=unreported), pool)
    (tmp_path / "train.npy").unlink()  # as if cut off between the two files
    assert same_pools(build_pool(tmp_path, "train", 300, 0, held_out=False, report=unreported), pool)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "train.npy"]


def test_pool_that_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    first = build_pool(tmp_path, "train", 10, 0, held_out=False, report=unreported)
    reports: list[int] = []
    again = build_pool(tmp_path, "train", 10, 0, held_out=False, report=lambda done, total: reports.append(done))
    assert reports == [] and same_pools(first, again)
    assert isinstance(again.pictures, np.memmap)


def test_pool_depends_on_seed_and_name(pool: Pool, tmp_path: Path) -> None:
    scenes = pool.scenes[:20]
    assert build_pool(tmp_path / "a", "train", 20, 0, held_out=False, report=unreported).scenes == scenes
    assert build_pool(tmp_path / "b", "train", 20, 1, held_out=False, report=unreported).scenes != scenes
    assert build_pool(tmp_path / "c", "more", 20, 0, held_out=False, report=unreported).scenes != scenes


def test_latents_are_normalised_and_computed_once(pool: Pool, tmp_path: Path) -> None:
    few = Pool(pool.scenes[:8], np.array(pool.pictures[:8]))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        autoencoder: Any = new_autoencoder()
    autoencoder.eval()
    normalise_latents(autoencoder, few, CPU)
    fresh = encode_pictures(autoencoder, few.pictures, CPU)
    assert fresh.shape == (8, 16, RESOLUTION // 8, RESOLUTION // 8)
    assert float(fresh.mean()) == pytest.approx(0.0, abs=0.01) and float(fresh.std()) == pytest.approx(1.0, abs=0.01)
    cached = cached_latents(few, autoencoder, tmp_path, CPU)
    assert cached.dtype == torch.float16 and torch.equal(cached, fresh.half())
    nobody: Any = None  # a second computation would need an autoencoder
    assert torch.equal(cached_latents(few, nobody, tmp_path, CPU), cached)


# -- the lessons ---------------------------------------------------------------------------------------------


def differences(left: Scene, right: Scene) -> int:
    count = int(left.layout != right.layout) + int(left.background != right.background)
    for a, b in zip(left.things, right.things, strict=True):
        count += sum(getattr(a, name) != getattr(b, name) for name in vars(a))
    return count


def test_contrasts_differ_in_one_attribute_and_never_leave_the_training_scenes() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        scene = draw_scene(rng, held_out=False)
        others = contrast_scenes(scene, rng, 3)
        assert len({scene.key(), *(other.key() for other in others)}) == 4
        assert [differences(scene, other) for other in others] == [1, 1, 1]
        assert not any(is_held_out(other) for other in others)
        for other in others:
            assert len({t.shape for t in other.things}) == len({t.color for t in other.things}) == len(other.things)


def test_pairs_are_described_from_either_side_and_mean_the_same() -> None:
    rng = np.random.default_rng(7)
    pairs = [draw_scene(rng, held_out=False, things=2) for _ in range(400)]
    told = [either_order(scene, rng) for scene in pairs]
    assert all(a.key() == b.key() for a, b in zip(pairs, told, strict=True))
    assert 0.4 < np.mean([a != b for a, b in zip(pairs, told, strict=True)]) < 0.6
    single = draw_scene(rng, held_out=False, things=1)
    assert all(either_order(single, rng) == single for _ in range(20))


def test_yes_and_no_are_about_equally_often_right() -> None:
    rng = np.random.default_rng(8)
    scenes = [draw_scene(rng, held_out=False) for _ in range(1500)]
    answers = [question_about(scene, rng)[1] for scene in scenes]
    assert 0.46 < np.mean(answers) < 0.58  # a change that the question leaves unsaid is answered with yes


def test_loss_of_the_policy_is_on_the_answers_only(pool: Pool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(WEIGHTS / "policy")
    examples = Examples(new_processor(tokenizer), CPU)
    answers = [canonical(pool.scenes[0]), "Yes"]

    def answers_in(labels: Tensor) -> list[str]:
        return [tokenizer.decode(row[row != -100]) for row in labels]

    rewriting = [(chat("rewrite: scarlet disc", picture=False), answer) for answer in answers]
    inputs, labels = examples(rewriting)
    assert answers_in(labels) == [f"{answer}<|im_end|>" for answer in answers]
    rows = [row[keep.bool()] for row, keep in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert [tokenizer.decode(row) for row in rows] == [f"{p}{a}<|im_end|>" for p, a in rewriting]

    describing = [(chat(DESCRIBE, picture=True), answer) for answer in answers]
    inputs, labels = examples(describing, list(np.array(pool.pictures[:2])))
    assert answers_in(labels) == [f"{answer}<|im_end|>" for answer in answers]
    is_picture = inputs["input_ids"].eq(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    assert is_picture.sum(dim=1).tolist() == [36, 36]
    assert torch.equal(inputs["mm_token_type_ids"], is_picture.int())


def test_cells_are_named_after_the_object_that_covers_them() -> None:
    ring = Thing("ring", "cyan", "small", "dotted")
    alone = cell_labels(Scene((Thing("star", "red", "large", "solid"),), "center", "mint")).reshape(4, 6, 6)
    covered = np.zeros((6, 6), bool)
    covered[2:4, 2:4] = True  # middles 11 px from the centre; the next ones are 25 px away, beyond 0.95 x 19.5
    assert ATTRIBUTES["shape"][alone[0, 2, 2]] == "star"
    assert ATTRIBUTES["color"][alone[1, 3, 3]] == "red"
    assert {ATTRIBUTES["shape"][index] for index in alone[0][~covered]} == {"nothing"}
    assert (alone[1:, ~covered] == IGNORED).all() and (alone[1:, covered] != IGNORED).all()

    pair = cell_labels(Scene((ring, Thing("cross", "blue", "large", "striped")), "below", "white")).reshape(4, 6, 6)
    assert ATTRIBUTES["shape"][pair[0, 4, 2]] == "ring"  # centre (48, 71.5): rows of 16 px, the fifth is 64..80
    assert ATTRIBUTES["shape"][pair[0, 1, 3]] == "cross"
    assert ATTRIBUTES["texture"][pair[3, 4, 3]] == "dotted"


def test_lesson_of_the_eyes_trains_the_vision_tower_of_the_policy_itself(pool: Pool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(WEIGHTS / "policy")
    torch.manual_seed(0)
    policy, processor = new_policy(tokenizer), new_processor(tokenizer)
    eyes = eyes_of(policy)
    inputs = processor.image_processor(images=[np.array(picture) for picture in pool.pictures[:2]], return_tensors="pt")
    logits, background = eyes(inputs["pixel_values"], inputs["image_grid_thw"])
    assert [tuple(part.shape) for part in logits] == [(2, 36, len(names)) for names in ATTRIBUTES.values()]
    assert tuple(background.shape) == (2, 5)
    logits[0].sum().backward()
    grads = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert grads and all(name.startswith("model.visual.") for name in grads)


def test_words_of_a_question_are_found_with_what_they_name() -> None:
    text = "please draw a tiny plus sign, polka-dot, dead centre, on seafoam background"
    found = [(text[:end].split(",")[-1].strip(), kind, value) for end, kind, value in named(text, 1)]
    assert found == [
        ("please draw a tiny", "size", "small"),
        ("please draw a tiny plus sign", "shape", "cross"),
        ("polka-dot", "texture", "dotted"),
        ("dead centre", "place", "center"),
        ("on seafoam", "background", "mint"),
    ]
    beside = "navy box on the left side of golden star"
    assert [(kind, value) for _, kind, value in named(beside, 2)] == [
        ("color", "blue"), ("shape", "square"), ("color", "yellow"), ("shape", "star")
    ]  # fmt: skip
    assert all(value in VALUES[kind] for kind, value in MEANINGS.values())


def test_about_half_of_the_words_of_scrambled_prompts_fit_in_every_kind() -> None:
    rng = rng_for(0, "test", "scramble")
    fitting: dict[str, list[bool]] = {kind: [] for kind in VALUES}
    for _ in range(400):
        scene = draw_scene(rng, held_out=False, things=1)
        told = scramble(scene, rng)
        thing = told.things[0]
        said = {**vars(thing), "background": told.background, "place": told.layout}
        for kind, value in said.items():
            fitting[kind].append(shows(scene, kind, value))
    for kind, values in fitting.items():  # one half, and what a new draw gives by chance
        by_chance = 0.5 + 0.5 / len(VALUES[kind])
        assert abs(np.mean(values) - by_chance) < 0.08, kind


def test_questions_to_compare_are_scrambled_first_and_balanced_after() -> None:
    rng = rng_for(0, "test", "compared")
    scenes = [draw_scene(rng, held_out=False) for _ in range(SCRAMBLED + ASKED)]
    answers = [compared(scenes, rng)[1] for _ in range(20)]
    assert np.mean([a[:SCRAMBLED] for a in answers]) < 0.2
    assert 0.5 < np.mean([a[SCRAMBLED:] for a in answers]) < 0.7  # some changes are left unsaid


def test_words_are_compared_at_their_own_tokens_and_cost_what_a_coin_would_before_training(pool: Pool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(WEIGHTS / "policy")
    torch.manual_seed(0)
    model = new_policy(tokenizer)
    examples = Examples(new_processor(tokenizer), CPU)
    scenes = pool.scenes[:4]
    questions = compared(scenes, rng_for(0, "test", "words"))[0]
    words = examples.words(questions, scenes)
    inputs, labels = examples(
        [(chat(question, picture=True), "No") for question in questions], [np.array(p) for p in pool.pictures[:4]]
    )
    for row, column, kind, value in words:
        said = tokenizer.decode(inputs["input_ids"][row, : column + 1])
        assert any(said.endswith(word) for word, meaning in MEANINGS.items() if meaning == (kind, value))

    comparison = Comparison(model)
    for head in (comparison.reads, comparison.fits):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    parts = comparison(inputs, labels, words, scenes)
    sizes = [len(VALUES[kind]) for _, _, kind, _ in words]
    assert parts["read"].item() == pytest.approx(math.log(2) * np.mean(sizes), rel=1e-5)
    assert parts["fit"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert parts["answer"].item() == pytest.approx(answer_loss(model, inputs, labels).item(), rel=1e-5)


@pytest.mark.slow
def test_everything_is_built_from_nothing_loads_as_shipped_and_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command but for the number of steps: every stage, its files, and the folders that a run loads."""
    for module, name in [
        (autoencoder, "RECIPE"), (clip, "RECIPE"), (diffusion, "RECIPE"), (eyes, "RECIPE"),
        (sft, "RECIPE"), (sft, "LAST"), (sft, "JUDGE"),
    ]:  # fmt: skip
        recipe = dataclasses.replace(getattr(module, name), steps=2)
        monkeypatch.setattr(module, name, recipe)
    monkeypatch.setattr(build, "POOL_SIZE", 320)
    monkeypatch.setattr(build, "HELD_OUT_SIZE", 40)
    monkeypatch.setattr(build, "WEIGHTS", tmp_path / "weights")

    def built() -> dict[str, bytes]:
        build.Build(tmp_path / "work", 0, CPU, compiled=False).run()
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "weights").rglob("*.safetensors")}

    first = built()
    assert {name.split("/")[1] for name in first} == {"image", "policy", "reward"}
    settings = {part: str(tmp_path / "weights" / part) for part in ("policy", "image", "reward")}
    config = RunConfig.load("tiny", ["placement.plan=cpu", *(f"models.{k}.path={v}" for k, v in settings.items())])
    environment = load_environment(config)
    assert len(environment.policy.sample(["a red disc"], [[1, 2]])[0]) == 2

    for stage in ("policy-last", "policy-judge", "denoiser"):  # as if it had been stopped before them
        (tmp_path / "work" / f"{stage}.pt").unlink()
    shutil.rmtree(tmp_path / "weights")
    assert built() == first
