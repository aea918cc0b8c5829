"""The memory plan of image models: every family and every setting that saves memory, against what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_engine.config import ConfigError, ImageModelConfig, RunConfig
from grpo_engine.image_families.base import PipelineModel
from grpo_engine.image_model import RenderJob, load_image_model
from grpo_engine.image_sizes import CLIP_H, CLIP_L_STATES, PUBLISHED_IMAGES, SD_VAE, image_size
from grpo_engine.memory import GIB, Memory, MemoryPlan, plan_memory
from grpo_engine.memory_needs import Needs, image_needs, total
from grpo_engine.placement import resolve
from grpo_engine.plan import Plan
from tests.image_folders import SETTINGS, write_image_model
from tests.test_memory import held, on, peak_of, planned, refused, size_of

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
FAMILIES = ("sd3", "sd35", "sdxl", "sd15", "flux", "pixart")
PUBLISHED = {
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "flux": "black-forest-labs/FLUX.1-dev",
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder_of("sdxl")``: a saved pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda name: root / name if (root / name).exists() else write_image_model(name, root / name)


def settings(name: str, folder: Path, **changes: Any) -> RunConfig:
    chosen = {"steps": 1, "resolution": 128, "dtype": "float32", **SETTINGS.get(name, {}), **changes}
    return RunConfig.parse({"models": {"image": {"path": str(folder), **chosen}}})


def needs(config: RunConfig, device: torch.device = CPU) -> Needs:
    return image_needs(config, device, image_size(config.models.image.path))


def loaded(config: RunConfig) -> PipelineModel:
    image = config.models.image
    return load_image_model(image.path, image, CPU, torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_planned_weights_are_those_that_are_loaded(name: str, folder_of: Callable[[str], Path]) -> None:
    config = settings(name, folder_of(name))
    parts = {
        part: held(module)
        for part, module in loaded(config).pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    weights = {item.what.partition(" in ")[0]: item.bytes for item in needs(config).stays if item.kind == "exact"}
    assert weights == parts


@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_needs_no_more_than_planned_and_at_least_a_third(name: str, folder_of: Callable[[str], Path]) -> None:
    jobs = [RenderJob("a red circle", seed) for seed in range(4)]
    for changes in ({}, {"decode_batch_size": 1}, {"decode_tile": 64}):
        config = settings(name, folder_of(name), batch_size=4, **changes)
        model = loaded(config)
        model.render(jobs[:1])  # its embedding is remembered, as planned apart
        measured = peak_of(lambda model=model: model.render(jobs))  # type: ignore[misc]
        estimate = max(total(phase) for phase in needs(config).phases)
        assert measured <= estimate <= 3 * measured, changes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_estimate_at_full_size_is_that_of_the_configuration(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass of the published denoiser on the meta device, which allocates nothing."""

    def in_flash_kernels(query: Any, key: Any, value: Any, *_args: Any, **_named: Any) -> torch.Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])  # on meta, attention would keep all scores

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", in_flash_kernels)
    size = PUBLISHED_IMAGES[PUBLISHED[name]]
    with torch.device("meta"), torch.no_grad():
        denoiser, inputs = FULL_SIZE[name]()
        denoiser.to(torch.bfloat16)
        part = "unet" if name in ("sdxl", "sd15") else "transformer"
        assert held(denoiser) == 2 * size.parts[part].elements
        measured = peak_of(lambda: denoiser(**inputs))
    chosen = {"resolution": 1024, "dtype": "bfloat16", "batch_size": 2, "guidance": 1.0}
    config = settings(name, folder_of(name), **(chosen | {"max_sequence_length": 256}))
    denoising = image_needs(config, GPU, size).phases[0]
    estimate = denoising[0].bytes or 0
    assert denoising[0].what == "denoising 2 pictures of 1024 x 1024"
    assert measured <= estimate <= 1.15 * measured


def _unet(**own: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=128, **own)


def _sdxl() -> tuple[Any, dict[str, Any]]:
    unet = _unet(
        cross_attention_dim=2048, attention_head_dim=[5, 10, 20], block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    added = {"text_embeds": narrow(2, 1280), "time_ids": narrow(2, 6)}
    return unet, {**of_unet(2048), "added_cond_kwargs": added}


def narrow(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def of_unet(width: int) -> dict[str, Any]:
    return {
        "sample": narrow(2, 4, 128, 128),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": narrow(2, 77, width),
    }


def _flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": narrow(2, 4096, 64), "encoder_hidden_states": narrow(2, 256, 4096),
        "pooled_projections": narrow(2, 768), "timestep": narrow(2), "img_ids": narrow(4096, 3),
        "txt_ids": narrow(256, 3), "guidance": torch.zeros(2),
    }  # fmt: skip


def _sd3() -> tuple[Any, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )  # fmt: skip
    return transformer, {
        "hidden_states": narrow(2, 16, 128, 128), "encoder_hidden_states": narrow(2, 333, 4096),
        "pooled_projections": narrow(2, 2048), "timestep": torch.zeros(2),
    }  # fmt: skip


FULL_SIZE: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd3": _sd3,
    "sdxl": _sdxl,
    "sd15": lambda: (_unet(cross_attention_dim=768, attention_head_dim=8), of_unet(768)),
    "flux": _flux,
}


def test_the_published_sizes_of_other_parts_are_those_of_their_configurations() -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        assert held(vae) == 4 * SD_VAE.elements
        for weights, width, layers in ((CLIP_L_STATES, 768, 12), (CLIP_H, 1024, 23)):
            reader = CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                )
            )  # fmt: skip
            assert held(reader) == 4 * weights.elements
        turbo = _unet(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
    assert held(turbo) == 4 * PUBLISHED_IMAGES["stabilityai/sd-turbo"].parts["unet"].elements


# -- settings that save memory -------------------------------------------------------------------------------


FLUX = ("models.image.path=black-forest-labs/FLUX.1-dev", "models.image.use_t5=true")
GPUS = {"cuda0": 80, "cuda1": 80, "cuda2": 80}


def full_scale(*overrides: str, **gpus: int) -> MemoryPlan:
    return planned(*overrides, preset="three-gpu", **(GPUS | gpus))


def test_t5_on_the_cpu_leaves_the_gpu_and_stays_in_the_hosts_memory() -> None:
    usual, moved = (
        full_scale("models.image.use_t5=true", f"models.image.t5_on_cpu={chosen}") for chosen in ("false", "true")
    )
    t5 = 2 * 4_762_310_656
    assert size_of(on(usual, "cuda:1"), "text_encoder_3") == size_of(on(moved, "cpu"), "text_encoder_3") == t5
    assert not any(item.what.startswith("text_encoder_3") for item in [*on(usual, "cpu"), *on(moved, "cuda:1")])
    need = [next(d.needed for d in plan.devices if d.device == "cuda:1") for plan in (usual, moved)]
    assert need[0] - need[1] == t5
    passing = [size_of([i for i in on(plan, "cpu") if i.part == "image model"], "weights") for plan in (usual, moved)]
    assert passing[0] - passing[1] == t5  # it is not converted on its way


def test_flux_is_planned_with_t5_and_one_pass() -> None:
    items = on(full_scale(*FLUX), "cuda:1")
    assert size_of(items, "transformer") == 2 * 11_901_408_320
    assert size_of(items, "text_encoder_2") == 2 * 4_762_310_656
    assert size_of(items, "512 remembered") == 512 * 256 * 4096 * 2
    assert size_of(items, "denoising") == 5 * (4096 + 256) * 3072 * 2 * 18  # guidance is told, not computed
    with pytest.raises(ConfigError, match="FLUX reads prompts with T5"):
        full_scale(FLUX[0])


def test_pictures_decoded_in_parts_need_less() -> None:
    def decoding(*overrides: str) -> int:
        return size_of(on(full_scale(*overrides), "cuda:1"), "decoding")

    whole = decoding()
    assert whole > 16 * GIB
    single = decoding("models.image.decode_batch_size=1")
    assert single == pytest.approx(whole / 5, rel=0.01)
    assert decoding("models.image.decode_batch_size=9") == whole
    assert decoding("models.image.decode_batch_size=1", "models.image.decode_tile=512") < 0.3 * single
    assert decoding("models.image.decode_tile=1024") == whole  # no smaller than the picture


@pytest.mark.parametrize(
    ("overrides", "room", "advised"),
    [
        ((), 18, "models.image.decode_batch_size=2"),
        (("models.image.decode_batch_size=1", "models.image.resolution=2048"), 18, "models.image.decode_tile=512"),
        (("models.image.use_t5=true", "models.image.decode_batch_size=1"), 18, "models.image.t5_on_cpu=true"),
    ],
)
def test_a_refusal_names_the_setting_that_saves_enough(overrides: tuple[str, ...], room: int, advised: str) -> None:
    plan = full_scale(*overrides, cuda1=room)
    assert advised in refused(plan)
    assert full_scale(*overrides, advised, cuda1=room).fits is True


def test_flux_is_never_advised_to_do_without_t5() -> None:
    plan = full_scale(*FLUX, cuda1=30)
    assert refused(plan)
    assert all("use_t5" not in setting for advice in plan.advice for setting in advice.settings)
    assert ("models.image.t5_on_cpu=true",) in [advice.settings for advice in plan.advice] or plan.advice


# -- batches sized by memory ---------------------------------------------------------------------------------


AUTO = "models.image.batch_size=0"


def test_an_automatic_batch_is_the_largest_that_fits_with_room_to_spare() -> None:
    plans = {gib: full_scale(AUTO, cuda1=gib) for gib in (14, 16, 24, 40, 80, 200)}
    batches = [plan.image_batch for plan in plans.values()]
    assert batches == sorted(batches) and batches[0] < batches[-1] == 20  # a step draws 4 x 5
    for gib, plan in plans.items():
        needed = next(device.needed for device in plan.devices if device.device == "cuda:1")
        assert needed <= 0.85 * gib * GIB
        written = full_scale(f"models.image.batch_size={plan.image_batch}", cuda1=gib)
        assert next(device.needed for device in written.devices if device.device == "cuda:1") == needed
        assert f"models.image.batch_size=0 (auto) is {plan.image_batch} here." in plan.as_text()
        parts = -(-20 // plan.image_batch)  # as few as possible, and as equal
        assert parts == 1 or 20 / plan.image_batch > parts - 1
        if plan.image_batch < 20:
            fewer = full_scale(f"models.image.batch_size={-(-20 // (parts - 1))}", cuda1=gib)
            assert next(device.needed for device in fewer.devices if device.device == "cuda:1") > 0.85 * gib * GIB


def test_where_not_even_one_picture_fits_an_automatic_batch_is_refused_with_advice() -> None:
    plan = full_scale(AUTO, cuda1=8)
    assert plan.image_batch == 1
    assert "models.image.resolution=" in refused(plan) or "models.image.decode_tile=" in refused(plan)


def test_a_model_of_unknown_size_gets_batches_of_a_group() -> None:
    assert full_scale(AUTO, "models.image.path=nobody/no-such-pipeline").image_batch == 5


def test_the_smallest_device_decides_for_all_image_models() -> None:
    config = RunConfig.load("three-gpu", [AUTO, "placement.plan=balanced"])
    memory = {"cpu": Memory(10**15, 10**15), "cuda:0": Memory(80 * GIB, 80 * GIB)}
    batches = []
    for second in (80, 20):
        there = memory | {"cuda:1": Memory(80 * GIB, 80 * GIB), "cuda:2": Memory(second * GIB, second * GIB)}
        batches.append(plan_memory(config, resolve(config.placement, list(there)), memory=there).image_batch)
    assert batches[1] < batches[0]


def test_a_run_goes_on_with_the_number_that_was_chosen() -> None:
    plan = Plan(RunConfig.load("tiny", [AUTO]))
    assert plan.config.models.image.batch_size == plan.memory.image_batch == 32  # 4 x 8, which fits easily
    written = RunConfig.load("tiny", ["models.image.batch_size=7"])
    assert Plan(written).config is written
    assert ImageModelConfig().batch_size == 32
