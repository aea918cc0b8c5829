"""Every family of image pipelines keeps one contract: a text and a latent seed make a picture, always the same one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_engine.config import ConfigError, ImageModelConfig
from grpo_engine.control import RunControl
from grpo_engine.image_families import FAMILIES, StableDiffusion3
from grpo_engine.image_families.base import PipelineModel
from grpo_engine.image_model import RenderJob, load_image_model
from grpo_engine.manager import execute
from grpo_engine.rollout import Picture
from grpo_engine.store import Store
from tests.engine_runs import create, small
from tests.image_folders import FOLDERS, SETTINGS, write_image_model

CPU = torch.device("cpu")
JOBS = [
    RenderJob("a red circle", 1),
    RenderJob("two small blue stars on a black square", 1),
    RenderJob("a red circle", 2),
]
Loaded = Callable[..., PipelineModel]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """``loaded("sdxl", steps=1, ...)``: a saved pipeline, read by the program's loader, nothing remembered."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pipelines")
    read: dict[tuple[str, bool], Any] = {}

    def load(name: str, **changes: Any) -> PipelineModel:
        path = folder / name
        settings = {"steps": 2, "resolution": 64, "dtype": "float32", **SETTINGS.get(name, {}), **changes}
        config = ImageModelConfig(path=str(path), **settings)
        if not path.exists():
            write_image_model(name, path)
        key = (name, config.use_t5)
        if key not in read:
            read[key] = load_image_model(str(path), config, CPU, torch.float32)
        model: PipelineModel = type(read[key])(read[key].pipeline, config)
        return model

    return load


def alike(first: list[Picture], second: list[Picture]) -> bool:
    """Equal up to rounding to whole numbers."""
    return all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_picture_depends_on_its_text_and_seed_alone(loaded: Loaded, name: str) -> None:
    pictures = loaded(name).render(JOBS)
    assert all(picture.dtype == np.uint8 and picture.shape == (64, 64, 3) for picture in pictures)
    torch.manual_seed(99)  # nothing may come from the global generator
    again = loaded(name).render(JOBS)
    assert all(np.array_equal(one, other) for one, other in zip(pictures, again, strict=True))
    assert not alike(pictures[:1], pictures[1:2])  # another text
    assert not alike(pictures[:1], pictures[2:])  # another seed
    alone = loaded(name, batch_size=1)
    assert alike(alone.render(JOBS[::-1])[::-1], pictures)  # other company


CALLS: dict[str, Callable[[PipelineModel, list[str]], dict[str, Any]]] = {
    "sd3": lambda model, texts: {"negative_prompt": [""] * len(texts), "max_sequence_length": 16},
    "sd3-without-t5": lambda model, texts: {"negative_prompt": [""] * len(texts), "max_sequence_length": 16},
    "sd35": lambda model, texts: {"negative_prompt": [""] * len(texts), "max_sequence_length": 16},
    "sdxl": lambda model, texts: {"negative_prompt": ["two small stars"] * len(texts)},
    "sd15": lambda model, texts: {},
    "turbo": lambda model, texts: {"generator": model._generators(JOBS)},
    "flux": lambda model, texts: {"max_sequence_length": 16},
}


@pytest.mark.parametrize("name", CALLS)
def test_pictures_are_those_the_pipeline_makes_by_itself(loaded: Loaded, name: str) -> None:
    model = loaded(name)
    texts = [job.text for job in JOBS]
    expected = model.pipeline(
        prompt=texts,
        latents=model._latents([job.latent_seed for job in JOBS]),
        num_inference_steps=2,
        guidance_scale=model.config.guidance,
        height=64,
        width=64,
        output_type="np",
        **CALLS[name](model, texts),
    ).images
    assert alike(model.render(JOBS), [(image * 255).round().astype(np.uint8) for image in expected])


def test_an_empty_negative_prompt_is_zeros_where_the_model_was_trained_so(loaded: Loaded) -> None:
    model = loaded("sdxl", negative_prompt="")
    assert all(not tensor.any() for tensor in model._encode_negative().values())  # type: ignore[attr-defined]
    assert all(tensor.any() for tensor in loaded("sdxl")._encode_negative().values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FOLDERS)
def test_poll_stops_between_steps_and_leaves_the_model_usable(loaded: Loaded, name: str) -> None:
    class Halt(Exception):
        """Raised by the poll below."""

    left = itertools.count(2, -1)

    def poll() -> None:
        if next(left) == 0:
            raise Halt

    model = loaded(name, steps=4)
    passes: list[int] = []
    handle = model.denoiser.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(Halt):
            model.render(JOBS[:1], poll=poll)
    finally:
        handle.remove()
    assert len(passes) == 2  # before the first step, after the first, and stopped after the second
    (after,), (fresh,) = model.render(JOBS[:1]), loaded(name, steps=4).render(JOBS[:1])
    assert np.array_equal(after, fresh)


@pytest.mark.parametrize(
    ("name", "room"),
    # CLIP reads 24 tokens with both ends; T5 reads 16 with its end, where it is there and reads on.
    [("sd3", 22), ("sd3-without-t5", 22), ("sdxl", 22), ("sd15", 22), ("flux", 15), ("pixart", 15)],
)
def test_tokens_that_no_encoder_reads_are_counted(loaded: Loaded, name: str, room: int) -> None:
    model = loaded(name)
    for words, cut in ((0, 0), (1, 0), (room, 0), (room + 1, 1), (room + 7, 7)):
        assert model.cut_tokens(" ".join(["red"] * words)) == cut


def test_t5_reads_on_where_clip_stops(loaded: Loaded) -> None:
    text = " ".join(["red"] * 30)
    assert loaded("sd3", max_sequence_length=64).cut_tokens(text) == 0
    assert loaded("sd3-without-t5", max_sequence_length=64).cut_tokens(text) == 8


@pytest.mark.parametrize("name", ["sd3", "sdxl", "sd15", "flux", "pixart"])
def test_decoding_few_at_a_time_changes_no_picture(loaded: Loaded, name: str) -> None:
    whole = loaded(name).render(JOBS)
    assert alike(loaded(name, decode_batch_size=1).render(JOBS), whole)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_tiles_are_decoded_apart_and_put_together(loaded: Loaded, name: str) -> None:
    model = loaded(name, resolution=128, decode_tile=64)
    sizes: list[tuple[int, ...]] = []
    handle = model.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    (tiled,) = model.render(JOBS[:1])
    handle.remove()
    assert len(sizes) > 1 and max(sizes) == (8, 8)
    (whole,) = loaded(name, resolution=128).render(JOBS[:1])  # of the same autoencoder: tiling ends with its setting
    assert tiled.shape == whole.shape == (128, 128, 3)
    assert np.abs(tiled.astype(int) - whole.astype(int)).mean() < np.abs(whole.astype(int) - whole.mean()).mean()


def test_out_of_memory_halves_the_batch_and_says_so(loaded: Loaded) -> None:
    expected = loaded("sd15").render(JOBS)
    model, heard = loaded("sd15", batch_size=3), []
    model.told = lambda kind, message: heard.append((kind, message))

    def small_card(_module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs[0].shape[0] > 2:  # one picture with guidance
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.denoiser.register_forward_pre_hook(small_card)
    try:
        assert alike(model.render(JOBS), expected)
    finally:
        handle.remove()
    assert model.batch_size == 1
    ((kind, message),) = heard
    assert kind == "warning"
    assert message == "Rendering 3 pictures at once ran out of memory on cpu; from now on at most 1 at a time."


def test_a_picture_that_does_not_fit_alone_is_refused_with_the_way_out(loaded: Loaded) -> None:
    model = loaded("sd15")

    def no_card(_module: Any, _inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.denoiser.register_forward_pre_hook(no_card)
    try:
        with pytest.raises(ConfigError, match=r"Not even one picture of 64 x 64 fits .* cpu: set models"):
            model.render(JOBS)
    finally:
        handle.remove()


def test_another_error_of_the_pipeline_is_no_lack_of_memory(loaded: Loaded) -> None:
    model = loaded("sd15", batch_size=3)

    def broken(_module: Any, _inputs: Any) -> None:
        raise RuntimeError("size mismatch")

    handle = model.denoiser.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.render(JOBS)
    finally:
        handle.remove()
    assert model.batch_size == 3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_t5_on_the_cpu_reads_there_and_changes_nothing(loaded: Loaded, name: str) -> None:
    usual = loaded(name)
    config = usual.config.model_copy(update={"t5_on_cpu": True})
    model = load_image_model(config.path, config, CPU, torch.float32)
    asked: list[str] = []

    class Elsewhere(torch.Tensor):
        """Token ids that are not on the CPU, as far as they know."""

        def cpu(self, *_args: Any, **_named: Any) -> torch.Tensor:
            asked.append("cpu")
            return self.as_subclass(torch.Tensor)

    encoder = getattr(model.pipeline, model.T5)
    ids = torch.tensor([[3, 4, 1]])
    assert torch.equal(encoder(ids.as_subclass(Elsewhere))[0], getattr(usual.pipeline, model.T5)(ids)[0])
    assert asked == ["cpu"]
    assert all(np.array_equal(a, b) for a, b in zip(model.render(JOBS), usual.render(JOBS), strict=True))


def test_the_autoencoder_stays_wide_when_the_rest_is_narrow(loaded: Loaded) -> None:
    config = loaded("flux").config
    model = load_image_model(config.path, config, CPU, torch.bfloat16)
    assert model.pipeline.vae.dtype == torch.float32
    assert model.denoiser.dtype == model.pipeline.text_encoder_2.dtype == torch.bfloat16
    (picture,) = model.render(JOBS[:1])
    assert picture.std() > 1


@pytest.mark.slow
def test_a_compiled_denoiser_draws_the_same(loaded: Loaded) -> None:
    usual = loaded("sd3-without-t5")
    config = usual.config.model_copy(update={"compile": True})
    model = load_image_model(config.path, config, CPU, torch.float32)
    assert model.denoiser._compiled_call_impl is not None
    assert alike(model.render(JOBS[:1]), usual.render(JOBS[:1]))


# -- what is refused, before any weights are read --------------------------------------------------------------


def refusal(folder: Path, class_name: str, **settings: Any) -> str:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(ConfigError) as caught:
        load_image_model(str(folder), ImageModelConfig(**settings), CPU, torch.float32)
    return str(caught.value)


def test_settings_a_family_cannot_follow_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "set it to true" in refusal(tmp_path, "FluxPipeline")
    assert "takes no negative prompt" in refusal(
        tmp_path, "FluxPipeline", use_t5=True, max_sequence_length=256, negative_prompt="blurred"
    )
    for name in ("FluxPipeline", "StableDiffusion3Pipeline"):
        assert "T5 would read nothing; set it to 256" in refusal(tmp_path, name, use_t5=True)


def test_a_pipeline_that_cannot_keep_the_contract_is_refused(tmp_path: Path) -> None:
    assert "takes no prompts with a generator" in refusal(tmp_path, "DDPMPipeline")
    assert "makes videos" in refusal(tmp_path, "WanPipeline")
    assert "does not know" in refusal(tmp_path, "PipelineOfTomorrow")


def test_noise_that_cannot_be_seeded_by_picture_is_refused(loaded: Loaded) -> None:
    pipeline = loaded("sd3-without-t5").pipeline
    kept = pipeline.scheduler
    pipeline.scheduler = type(kept).from_config(kept.config, stochastic_sampling=True)
    try:
        with pytest.raises(ConfigError, match="stochastic_sampling"):
            StableDiffusion3(pipeline, ImageModelConfig())
    finally:
        pipeline.scheduler = kept


def test_pipelines_are_told_apart_by_their_class(loaded: Loaded) -> None:
    kinds = {name: type(loaded(name)).__name__ for name in ("sd3", "sd35", "sdxl", "sd15", "flux", "pixart")}
    assert kinds == {
        "sd3": "StableDiffusion3", "sd35": "StableDiffusion3", "sdxl": "StableDiffusionXL",
        "sd15": "StableDiffusion", "flux": "Flux", "pixart": "OtherPipeline",
    }  # fmt: skip
    assert set(FAMILIES) == {
        "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "StableDiffusionPipeline", "FluxPipeline",
    }  # fmt: skip


# -- a run ---------------------------------------------------------------------------------------------------


def test_a_run_learns_through_another_family_from_beginning_to_end(loaded: Loaded, tmp_path: Path) -> None:
    path = loaded("sdxl").config.path
    config = small(
        f"models.image.path={path}", "models.image.resolution=64", "models.image.batch_size=0",
        "evaluation.judge=none", "training.steps=2", "sampling.max_new_tokens=30", "sampling.temperature=3",
    )  # fmt: skip
    with Store(tmp_path / "runs.db") as store:
        run_id = create(store, config)
        assert execute(store, run_id, RunControl()) == "finished", store.run(run_id).error
        steps = store.steps(run_id, ["images_rendered", "cut_tokens", "cut_share", "skipped"])
        assert steps["images_rendered"].min() >= 2 and not steps["skipped"].any()
        model = loaded("sdxl")
        for step, tokens, share in zip(steps["step"], steps["cut_tokens"], steps["cut_share"], strict=True):
            cut = [model.cut_tokens(row.rewrite) for row in store.rollouts(run_id, int(step)) if row.rewrite]
            assert tokens == pytest.approx(np.mean(cut))
            assert share == pytest.approx(np.mean([count > 0 for count in cut]))
        assert steps["cut_share"].max() > 0  # hot sampling writes on and on
        (event,) = [event for event in store.events(run_id, limit=None) if event.kind == "image_batch"]
        assert event.message == "At most 6 pictures at once fit."
        assert store.run(run_id).summary is not None
