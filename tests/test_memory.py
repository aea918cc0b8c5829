"""The memory plan: sizes against real models, estimates against measured peaks, refusals, and advice that is true."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_engine.config import ConfigError, RunConfig
from grpo_engine.doctor import examine, print_findings
from grpo_engine.environment import PureGRPOPromptEnvironment
from grpo_engine.image_model import RenderJob, StableDiffusion3
from grpo_engine.image_sizes import CLIP_G, CLIP_L, PUBLISHED_IMAGES, SD3_VAE, T5_XXL, image_size
from grpo_engine.memory import GIB, Memory, MemoryPlan, MemoryRefusal, plan_memory
from grpo_engine.memory_host import at_once
from grpo_engine.memory_needs import Item, UpdatePass, estimate, policy_needs, saved_by_layer, total, update_pass
from grpo_engine.model_sizes import (
    PUBLISHED_POLICIES,
    PolicySize,
    policy_size,
    prompt_tokens,
    read_sizes,
    reward_size,
)
from grpo_engine.placement import intended, resolve
from grpo_engine.plan import Plan
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.prompts import Prompt
from grpo_engine.tiny import WEIGHTS
from grpo_engine.weight_sizes import UnknownSize, Weights
from tests.conftest import Biased, run_config
from tests.saved_policy import write_base

CPU = torch.device("cpu")
ROOMY = Memory(10**15, 10**15)


class LivePeak(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, from their making to their end; what was there before, not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_in = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given_in and key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._ended, key, size)
        return out

    def _ended(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_of(work: Callable[[], object]) -> int:
    with LivePeak() as live:
        work()
    return live.peak


def planned(*overrides: str, preset: str = "tiny", free: int = ROOMY.free, **gpus: int) -> MemoryPlan:
    """A plan on a CPU with ``free`` bytes and GPUs ``cuda0=GiB, cuda1=GiB``."""
    memory = {f"cuda:{name[4:]}": Memory(gib * GIB, gib * GIB) for name, gib in gpus.items()}
    memory["cpu"] = Memory(free, ROOMY.total)
    config = RunConfig.load(preset, overrides)
    return plan_memory(config, resolve(config.placement, list(memory)), memory=memory)


def on(plan: MemoryPlan, device: str) -> list[Item]:
    (found,) = (entry.items for entry in plan.devices if entry.device == device)
    return list(found)


def size_of(items: list[Item], what: str) -> int:
    """Bytes of the items whose description begins with ``what``."""
    found = [item.bytes for item in items if item.what.startswith(what)]
    assert found, f"no item {what!r} in {[item.what for item in items]}"
    assert None not in found
    return sum(size or 0 for size in found)


def held(module: Any) -> int:
    """Bytes of a module's parameters and saved buffers, shared ones once."""
    tensors = {t.untyped_storage()._cdata: t for t in module.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# -- sizes against real models -------------------------------------------------------------------------------


def test_planned_weights_of_the_embedded_models_are_those_of_the_loaded_ones(
    environment: PureGRPOPromptEnvironment, base_of: Callable[[PureGRPOPolicy], Any]
) -> None:
    items = on(planned(), "cpu")
    base = [(name, p) for name, p in base_of(environment.policy).named_parameters() if "lora_" not in name]
    assert size_of([i for i in items if i.part == "policy"], "weights") == sum(p.numel() * 4 for _, p in base)
    assert isinstance(environment.images, StableDiffusion3)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert size_of(items, f"{name} in") == held(getattr(environment.images.pipeline, name)), name
    scorer: Any = environment.reward.scorer
    assert size_of([i for i in items if i.part == "reward"], "weights") == held(scorer.model)
    assert all(item.kind == "exact" for item in items if " in " in item.what and "pictures" not in item.what)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("rank", [3, 16])
def test_the_planned_adapter_is_the_one_that_is_trained(
    own_policy: Callable[..., PureGRPOPolicy], targets: str, rank: int
) -> None:
    overrides = (f"models.policy.lora.targets={targets}", f"models.policy.lora.rank={rank}")
    trained = sum(p.numel() * p.element_size() for p in own_policy(*overrides).trainable().values())
    assert size_of(on(planned(*overrides), "cpu"), "adapter, its") == 4 * trained  # and gradient, and two moments


def test_training_all_weights_needs_a_copy_and_their_state(own_policy: Callable[..., PureGRPOPolicy]) -> None:
    policy = own_policy("models.policy.adapter=full")
    trained = sum(p.numel() * p.element_size() for p in policy.trainable().values())
    items = on(planned("models.policy.adapter=full"), "cpu")
    assert size_of(items, "gradients and AdamW") == 3 * trained
    assert size_of(items, "untouched copy") == sum(p.numel() * 4 for p in policy.model.parameters())


def test_a_folder_without_weights_is_sized_by_its_configuration_alone(tmp_path: Path) -> None:
    for part in ("policy", "image", "reward"):
        shutil.copytree(WEIGHTS / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    before = torch.get_rng_state()
    paths = [f"models.{part}.path={tmp_path / part}" for part in ("policy", "image", "reward")]
    sizes, files = read_sizes(RunConfig.load("tiny", paths)), read_sizes(RunConfig.load("tiny"))
    assert torch.equal(torch.get_rng_state(), before)
    assert sizes.policy is not None and files.policy is not None
    assert files.policy.weights.stored == torch.float16
    assert sizes.policy.weights == Weights(files.policy.weights.elements, "configuration")
    assert sizes.policy.vision == files.policy.vision
    assert sizes.image is not None and files.image is not None
    assert {name: part.elements for name, part in sizes.image.parts.items()} == {
        name: part.elements for name, part in files.image.parts.items()
    }
    assert sizes.reward is not None and files.reward is not None
    assert sizes.reward.weights == Weights(files.reward.weights.elements, "configuration")


def test_sharded_weights_are_added_up_and_missing_shards_never_undercounted(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    whole = write_base(tmp_path / "whole")
    AutoModelForImageTextToText.from_pretrained(whole).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    size = policy_size(str(whole))
    assert policy_size(str(tmp_path / "shards")) == size
    assert size.weights.source == "files"
    shards[1].unlink()  # a download that was cut short
    assert policy_size(str(tmp_path / "shards")).weights == Weights(size.weights.elements, "configuration")


def test_t5_keeps_its_output_weights_wide_in_float16_only() -> None:
    weights = Weights(100, "files", wide=30)
    assert [weights.bytes(kind) for kind in (torch.float32, torch.bfloat16, torch.float16)] == [400, 200, 260]


QWEN2_VL = {
    "Qwen/Qwen2-VL-7B-Instruct": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tied": False,
    },
    "Qwen/Qwen2-VL-2B-Instruct": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "tied": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2-VL-7B-Instruct", 8.29), ("Qwen/Qwen2-VL-2B-Instruct", 2.21)]
)
def test_the_published_size_of_qwen2_vl_is_that_of_its_configuration(
    name: str, billions: float, tmp_path: Path
) -> None:
    from transformers import Qwen2VLConfig

    text: dict[str, Any] = {**QWEN2_VL[name], "num_hidden_layers": 28}
    tied = text.pop("tied")
    Qwen2VLConfig(
        text_config=text, vision_config={"hidden_size": text["hidden_size"]}, tie_word_embeddings=tied
    ).save_pretrained(tmp_path)
    built, published = policy_size(str(tmp_path)), PUBLISHED_POLICIES[name]
    assert round(built.weights.elements / 1e9, 2) == billions
    assert built == PolicySize(**{**vars(published), "weights": Weights(built.weights.elements, "configuration")})
    assert built.weights.elements == published.weights.elements


def _published(name: str) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL or Qwen3-VL repository, as far as sizes depend on it."""
    size = PUBLISHED_POLICIES[name]
    text = {
        "hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "vocab_size": size.vocabulary,
    }  # fmt: skip
    tower: dict[str, Any] = {"out_hidden_size": size.hidden, "hidden_size": size.vision_width, "num_heads": 16}
    tower["spatial_merge_size"] = 2
    if "Qwen2.5" in name:
        vision = tower | {"depth": 32, "intermediate_size": 3420, "patch_size": 14}
        return {"model_type": "qwen2_5_vl", "tie_word_embeddings": "3B" in name, "vision_config": vision, **text}
    large = "8B" in name
    vision = tower | {"patch_size": 16, "intermediate_size": 4304 if large else 4096, "depth": 27 if large else 24}
    vision |= {"deepstack_visual_indexes": [8, 16, 24] if large else [5, 11, 17], "model_type": "qwen3_vl"}
    text |= {"head_dim": 128, "model_type": "qwen3_vl_text"}
    return {
        "model_type": "qwen3_vl", "tie_word_embeddings": not large, "vision_config": vision, "text_config": text
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"]
)
def test_the_published_sizes_of_later_families_are_those_of_their_configurations(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_published(name)))
    built, published = policy_size(str(tmp_path)), PUBLISHED_POLICIES[name]
    weights = Weights(published.weights.elements, "configuration")
    assert built == PolicySize(**{**vars(published), "weights": weights})


def test_the_published_sizes_of_stable_diffusion_3_are_those_of_its_configurations() -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    denoisers: dict[str, dict[str, Any]] = {
        "stabilityai/stable-diffusion-3-medium-diffusers": {"pos_embed_max_size": 192},
        "stabilityai/stable-diffusion-3.5-medium": {
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
        "stabilityai/stable-diffusion-3.5-large": {
            "pos_embed_max_size": 192, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38,
            "caption_projection_dim": 2432,
        },
    }  # fmt: skip
    common = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    }  # fmt: skip
    with torch.device("meta"):
        for name, own in denoisers.items():
            model: Any = SD3Transformer2DModel(**{**common, **own})
            assert held(model) == 4 * PUBLISHED_IMAGES[name].parts["transformer"].elements, name
            assert model.inner_dim == PUBLISHED_IMAGES[name].width
            if name == "stabilityai/stable-diffusion-3-medium-diffusers":
                assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 2.03
        vae: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        assert sum(p.numel() for p in vae.parameters()) == SD3_VAE.elements
        for weights, width, layers in ((CLIP_L, 768, 12), (CLIP_G, 1280, 32)):
            reader = CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=width // 64, projection_dim=width,
                )
            )  # fmt: skip
            assert sum(p.numel() for p in reader.parameters()) == weights.elements
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        )
        assert sum(p.numel() for p in t5.parameters()) == T5_XXL.elements
        assert sum(p.numel() for name, p in t5.named_parameters() if ".wo." in name) == T5_XXL.wide


def test_the_reward_of_the_full_scale_is_sized_from_its_configuration() -> None:
    size = reward_size(RunConfig.load("three-gpu"))
    assert size.weights == Weights(151_277_313, "configuration")  # ViT-B/32, 151 M
    assert (size.image_size, size.width, size.tokens) == (224, 768, 50)


def test_a_model_that_is_not_here_has_no_made_up_size() -> None:
    with pytest.raises(UnknownSize, match="until its configuration is on this machine"):
        policy_size("nobody/no-such-policy")
    with pytest.raises(UnknownSize):
        image_size("nobody/no-such-pipeline")
    plan = planned("models.policy.path=nobody/no-such-policy")
    (item,) = (item for item in on(plan, "cpu") if item.part == "policy")
    assert (item.bytes, item.kind) == (None, "unknown")
    assert plan.fits is None
    plan.require()  # not refused: it may fit
    text = "\n".join(plan.as_text())
    assert "needs at least" in text
    assert "nobody/no-such-policy" in text
    assert planned("models.policy.path=nobody/no-such-policy", free=GIB).fits is False  # the others alone are too much


# -- estimates against what is measured ----------------------------------------------------------------------


def phase_of(config: RunConfig, phase: str, prompts: list[str]) -> int:
    """Bytes of the embedded policy's largest phase that begins with the item ``phase``."""
    phases = policy_needs(config, CPU, prompt_tokens(config, prompts), policy_size("tiny")).phases
    return max(total(items) for items in phases if items[0].what.startswith(phase))


def endless(biased: Biased, policy: PureGRPOPolicy) -> AbstractContextManager[None]:
    """Inside, completions are as long as they may be, whatever the policy has learned."""
    ends = torch.zeros(policy.suppressed.shape, dtype=torch.bool)
    ends[policy.end_tokens] = True
    return biased(policy, lambda logits: logits.masked_fill(ends, -torch.inf))


@pytest.mark.parametrize("truncation", ["sampling.top_k=0", "sampling.top_k=50", "sampling.top_p=0.9"])
@pytest.mark.parametrize("rows", [2, 8, 16])
def test_the_update_needs_no_more_than_planned_and_at_least_half(
    own_policy: Callable[..., PureGRPOPolicy], biased: Biased, prompts: list[Prompt], truncation: str, rows: int
) -> None:
    overrides = (truncation, f"training.update_rows={rows}", "sampling.max_new_tokens=16")
    policy = own_policy(*overrides)
    texts = sorted((prompt.text for prompt in prompts), key=len)[-max(1, rows // 8) :]
    with endless(biased, policy):
        groups = policy.sample(texts, [list(range(8))] * len(texts))
    together = [group.rows(slice(0, rows)) for group in groups]  # some of a group, all of it, or two groups

    def update() -> None:
        with torch.no_grad(), policy.reference():
            reference, _ = policy.token_logprobs(*together)
        logprobs, entropies = policy.token_logprobs(*together)
        (logprobs.sum() + entropies.sum() - reference.sum()).backward()

    policy.model.train()
    measured = peak_of(update)
    estimate = phase_of(run_config(*overrides), "activations", texts)
    assert measured <= estimate <= 2 * measured


def test_gradient_checkpointing_saves_what_is_planned(
    own_policy: Callable[..., PureGRPOPolicy], biased: Biased, prompts: list[Prompt]
) -> None:
    text, peaks, plans = prompts[0].text, [], []
    for chosen in ("false", "true"):
        overrides = (
            f"models.policy.gradient_checkpointing={chosen}",
            "sampling.max_new_tokens=16",
            "training.update_rows=8",
        )
        policy = own_policy(*overrides)
        with endless(biased, policy):
            (group,) = policy.sample([text], [list(range(8))])
        policy.model.train()
        peaks.append(peak_of(lambda p=policy, g=group: p.token_logprobs(g)[0].sum().backward()))  # type: ignore[misc]
        plans.append(phase_of(run_config(*overrides), "activations", [text]))
    assert peaks[1] < 0.75 * peaks[0]
    assert plans[1] < 0.75 * plans[0]
    assert peaks[1] <= plans[1] <= 2 * peaks[1]


@pytest.mark.parametrize("truncation", ["sampling.top_k=0", "sampling.top_k=50", "sampling.top_p=0.9"])
def test_sampling_needs_no_more_than_planned_and_at_least_half_where_kept_sets_have_a_known_size(
    own_policy: Callable[..., PureGRPOPolicy], biased: Biased, prompts: list[Prompt], truncation: str
) -> None:
    config = run_config(truncation, "sampling.max_new_tokens=16", "models.image.batch_size=8")
    policy = own_policy(truncation, "sampling.max_new_tokens=16")
    texts = [prompt.text for prompt in prompts]
    seeds = [[8 * row + k for k in range(8)] for row in range(len(texts))]
    with endless(biased, policy):
        measured = peak_of(lambda: policy.sample(texts, seeds))
    estimate = phase_of(config, "key-value cache", texts)
    assert measured <= estimate
    assert estimate <= 2 * measured or "top_p" in truncation  # a nucleus may hold the whole vocabulary


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "overrides"),
    [
        (torch.float32, 8, []),
        (torch.bfloat16, 2, []),
        (torch.bfloat16, 2, ["models.policy.lora.targets=attention"]),
        (torch.bfloat16, 2, ["models.policy.adapter=full"]),
        (torch.float32, 8, ["models.policy.adapter=full"]),
    ],
)
def test_a_layer_saves_for_the_backward_pass_what_is_planned(
    dtype: torch.dtype, kv_heads: int, overrides: list[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from grpo_engine import shared_prefix
    from grpo_engine.policy_family import adapter_layers

    hidden, inner, layers, rows = 128, 320, 3, 2
    text = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": kv_heads, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"hidden_size": hidden, "depth": 1, "embed_dim": 32, "num_heads": 2}
    with torch.random.fork_rng():
        model: Any = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
        model.to(dtype)
        model.requires_grad_(False)
        config = RunConfig.load("tiny", overrides)
        lora = config.models.policy.lora
        if config.models.policy.adapter == "lora":
            get_peft_model(model, LoraConfig(r=lora.rank, target_modules=adapter_layers(model, lora.targets)))
        else:
            model.model.language_model.requires_grad_(True)
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    head, tail = 24, 17
    last = head + tail - 1
    ids = torch.full((rows, tail), 5)
    assert shared_prefix.prepare(model, torch.zeros(100, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shared_prefix.hidden_states(
            model, [torch.full((head,), 5)], [rows], ids, torch.ones_like(ids, dtype=torch.bool)
        )
    tokens, keys, pairs = head + rows * (tail - 1), head + rows * last, head**2 + rows * (tail - 1) * last
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = sum(size for key, (size, _) in storages.items() if key not in weights)
    size = PolicySize(Weights(0, "files"), 0, hidden, layers, 8, kv_heads, 16, inner, 100, 0, 0)
    estimate = layers * saved_by_layer(config, size, dtype.itemsize, tokens, keys, pairs)
    assert 0.97 * estimate <= saved <= estimate + tokens * 3 * hidden * 4  # embeddings and the last norm


@pytest.mark.parametrize("batch", [2, 8])
def test_rendering_needs_no_more_than_planned_and_at_least_a_third(
    environment: PureGRPOPromptEnvironment, batch: int
) -> None:
    assert isinstance(environment.images, StableDiffusion3)
    images = StableDiffusion3(environment.images.pipeline, run_config(f"models.image.batch_size={batch}").models.image)
    images.render([RenderJob("a red cube", 0)])  # its embedding is remembered, as planned apart
    measured = peak_of(lambda: images.render([RenderJob("a red cube", seed) for seed in range(batch)]))
    estimate = size_of(on(planned(f"models.image.batch_size={batch}"), "cpu"), f"decoding {batch} pictures")
    assert measured <= estimate <= 3 * measured


def test_denoising_needs_no_more_than_planned_and_at_least_a_third(environment: PureGRPOPromptEnvironment) -> None:
    assert isinstance(environment.images, StableDiffusion3)
    pipeline = environment.images.pipeline
    states, pooled = environment.images._embed(["a red cube"] * 16).values()
    latents = torch.zeros(16, 16, 12, 12, dtype=states.dtype)

    @torch.no_grad()
    def step() -> None:
        pipeline.transformer(latents, states, pooled, torch.zeros(16))

    measured = peak_of(step)
    estimate = size_of(on(planned("models.image.batch_size=8"), "cpu"), "denoising 8 pictures")  # 16 rows with guidance
    assert measured <= estimate <= 3 * measured


def test_scoring_needs_no_more_than_planned_and_at_least_a_third(environment: PureGRPOPromptEnvironment) -> None:
    import numpy as np

    for side in (96, 192):
        pictures = [np.zeros((side, side, 3), np.uint8)] * 8
        measured = peak_of(lambda p=pictures: environment.reward.scorer.score(p, ["a red cube"] * 8))  # type: ignore[misc]
        plan = planned("models.image.batch_size=8", f"models.image.resolution={side}")
        estimate = size_of(on(plan, "cpu"), "scoring 8 pictures")
        assert measured <= estimate <= 3 * measured


def test_prompts_are_measured_in_the_policys_own_tokens(own_policy: Callable[..., PureGRPOPolicy]) -> None:
    texts = ["a red cube", "a large striped cyan triangle on a gray background"]
    overrides = ("models.policy.system=be brief",)
    longest = max(len(own_policy(*overrides).prompt_ids(text)) for text in texts)
    assert prompt_tokens(run_config(*overrides), texts) == longest
    elsewhere = run_config("models.policy.path=nobody/no-such-policy")  # 100 bytes and "rewrite: {prompt}"
    assert prompt_tokens(elsewhere, ["x" * 100, "y"]) == 32 + 39
    assert prompt_tokens(elsewhere, []) == 32 + 139


# -- the plan ------------------------------------------------------------------------------------------------


def test_the_embedded_models_are_planned_at_once_and_fit() -> None:
    config = RunConfig.load("tiny")
    placement = resolve(config.placement, ["cpu"])
    begun = time.process_time()
    plan = plan_memory(config, placement)
    assert time.process_time() - begun < 0.5
    assert plan.fits is True
    assert [device.device for device in plan.devices] == ["cpu"]
    assert plan.devices[0].needed < 2 * GIB
    assert plan.advice == ()


def test_only_the_largest_phase_of_a_device_counts() -> None:
    plan = planned("placement.plan=one-gpu", "models.image.use_t5=true", preset="three-gpu", cuda0=100)
    (gpu, cpu) = plan.devices
    phases = {"key-value": "sampling", "activations": "update", "decoding": "rendering", "scoring": "scoring"}
    sizes = {name: size_of(list(gpu.items), what) for what, name in phases.items()}
    counted = [item.what for item in gpu.items if item.counted]
    assert max(sizes, key=lambda name: sizes[name]) == "rendering"
    assert sum(any(what.startswith(first) for first in phases) for what in counted) == 1
    stays = [i for i in gpu.items if i.kind in ("exact", "published size")]
    assert all(item.counted for item in stays)
    assert gpu.needed == sum(item.bytes or 0 for item in gpu.items if item.counted)
    assert [item for item in cpu.items if item.part == "policy"] == []


def test_weights_pass_through_the_hosts_memory_only_to_be_converted() -> None:
    def passing(*overrides: str) -> list[Item]:
        plan = planned("placement.plan=one-gpu", *overrides, preset="three-gpu", cuda0=200)
        return [item for item in on(plan, "cpu") if item.part not in ("process", "pictures")]

    (image,) = passing("models.image.use_t5=true")  # the policy's files hold bfloat16, the image model's float16
    assert image.bytes == size_of([image], "weights converted on their way to cuda:0") > 15e9
    policy, image = passing("models.policy.dtype=float16")
    assert (policy.bytes, policy.counted) == (2 * 8_291_375_616, True)  # one model after the other
    assert image.counted is False


def test_the_full_scale_needs_what_is_known_of_it() -> None:
    plan = planned(preset="three-gpu", cuda0=80, cuda1=80, cuda2=80)
    assert plan.fits is True
    policy, image, reward = (on(plan, f"cuda:{index}") for index in range(3))
    assert round(size_of(policy, "weights") / 1e9, 1) == 16.6  # bfloat16
    assert round(size_of(policy, "adapter") / 1e9, 2) == 0.65  # 40 M parameters with gradient and AdamW
    without_t5 = sum(size_of(image, part) for part in ("transformer", "text_encoder in", "text_encoder_2", "vae"))
    assert 5.9e9 < without_t5 < 6.3e9  # the autoencoder in float32
    assert {item.kind for item in policy if item.what.startswith("weights")} == {"published size"}
    assert round(size_of(reward, "weights") / 1e9, 1) == 0.6  # float32
    with_t5 = on(planned("models.image.use_t5=true", preset="three-gpu", cuda0=80, cuda1=80, cuda2=80), "cuda:1")
    assert size_of(with_t5, "text_encoder_3") == 2 * 4_762_310_656


def test_every_image_model_has_its_own_share() -> None:
    plan = planned("placement.plan=balanced", preset="three-gpu", cuda0=80, cuda1=80, cuda2=80)
    first, second = on(plan, "cuda:1"), on(plan, "cuda:2")
    assert size_of(first, "transformer") == size_of(second, "transformer") > 0
    assert [item for item in first if item.part == "reward"] == []
    assert [item for item in second if item.part == "reward"]


def test_rows_are_plain_data_that_add_up() -> None:
    plan = planned(preset="three-gpu", cuda0=80, cuda1=80, cuda2=80)
    rows = json.loads(json.dumps(plan.as_rows()))
    for device in plan.devices:
        own = [row for row in rows if row["device"] == device.device and row["counted"]]
        assert sum(row["gib"] for row in own) == pytest.approx(device.needed / GIB, abs=0.01)
    assert set(rows[0]) == {"device", "part", "what", "gib", "kind", "counted"}
    assert {row["kind"] for row in rows} == {"exact", "estimate", "published size"}
    assert json.loads(json.dumps(plan.as_data()))["fits"] is True


SAVING = {
    "training.update_rows": st.integers(1, 8),
    "training.logit_chunk": st.integers(1, 200),
    "sampling.prompts_per_pass": st.integers(1, 4),
    "models.image.batch_size": st.integers(1, 32),
    "sampling.max_new_tokens": st.integers(1, 64),
}


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(SAVING)), data=st.data())
def test_a_smaller_chunk_never_needs_more(name: str, data: st.DataObject) -> None:
    small, large = sorted((data.draw(SAVING[name]), data.draw(SAVING[name])))
    need = [planned(f"{name}={value}").devices[0].needed for value in (small, large)]
    assert need[0] <= need[1]


# -- what can't fit ------------------------------------------------------------------------------------------


def refused(plan: MemoryPlan) -> str:
    with pytest.raises(MemoryRefusal) as caught:
        plan.require()
    assert caught.value.plan is plan
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_run_that_cannot_fit_is_refused_with_device_need_and_what_would_help() -> None:
    plan = planned(preset="three-gpu", cuda0=24, cuda1=16, cuda2=16)
    message = refused(plan)
    need = next(device.needed for device in plan.devices if device.device == "cuda:1")
    assert message.startswith(f"cuda:1 needs about {need / GIB:.1f} GiB (process 614 MiB, image model ")
    assert "but only 16.0 GiB of its 16.0 GiB are free; set models.image.decode_batch_size=2, or " in message
    assert "cuda:0" not in message


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], {"cuda0": 24, "cuda1": 16, "cuda2": 16}),
        (["models.image.use_t5=true"], {"cuda0": 24, "cuda1": 24, "cuda2": 16}),
        (["models.policy.dtype=float32"], {"cuda0": 24, "cuda1": 48, "cuda2": 16}),
        (["placement.plan=one-gpu"], {"cuda0": 40, "cuda1": 80}),
        (
            ["sampling.num_rollouts=64", "models.policy.gradient_checkpointing=false"],
            {"cuda0": 32, "cuda1": 80, "cuda2": 9},
        ),
        (["models.policy.dtype=float32", "models.image.use_t5=true"], {"cuda0": 24, "cuda1": 24, "cuda2": 16}),
    ],
)
def test_following_the_advice_makes_the_run_fit(overrides: list[str], gpus: dict[str, int]) -> None:
    plan = planned(*overrides, preset="three-gpu", **gpus)
    refused(plan)
    assert plan.advice
    for advice in plan.advice:
        followed = planned(*overrides, *advice.settings, preset="three-gpu", **gpus)
        assert followed.fits is True, advice
        assert {device.device: device.needed for device in followed.devices} == advice.needed
        if len(advice.settings) > 1:  # each of them is needed
            for index in range(len(advice.settings)):
                others = [*advice.settings[:index], *advice.settings[index + 1 :]]
                assert planned(*overrides, *others, preset="three-gpu", **gpus).fits is False


def test_advice_takes_the_mildest_value_that_fits() -> None:
    gpus = {"cuda0": 24, "cuda1": 16, "cuda2": 16}
    (advice,) = (
        a for a in planned(preset="three-gpu", **gpus).advice if a.settings[0].startswith("models.image.batch")
    )
    value = int(advice.settings[0].partition("=")[2])
    assert planned(f"models.image.batch_size={2 * value}", preset="three-gpu", **gpus).fits is False


def test_another_plan_is_advised_where_other_gpus_have_the_room() -> None:
    plan = planned("placement.plan=one-gpu", preset="three-gpu", cuda0=24, cuda1=80)
    assert "placement.plan=two-gpu" in [advice.settings[0] for advice in plan.advice]


def test_where_nothing_helps_the_refusal_says_so() -> None:
    plan = planned(preset="three-gpu", cuda0=4, cuda1=80, cuda2=8)
    assert plan.advice == ()
    assert refused(plan).endswith(
        "no settings of these models make it fit; use smaller ones, or a device with more memory."
    )


def test_a_policy_of_4_bits_is_advised_where_the_whole_one_does_not_fit() -> None:
    plan = planned(preset="three-gpu", cuda0=12, cuda1=80, cuda2=8)
    assert [advice.settings for advice in plan.advice] == [("models.policy.quantize=4bit",)]
    packed = planned("models.policy.quantize=4bit", preset="three-gpu", cuda0=12, cuda1=80, cuda2=8)
    weights = next(item for item in packed.devices[0].items if item.what == "weights in 4 bits and bfloat16")
    # Qwen2-VL-7B: 6.53 of 8.29 billion weights are in the language model's linear layers.
    size = PUBLISHED_POLICIES["Qwen/Qwen2-VL-7B-Instruct"]
    assert size.packable == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert weights.bytes == pytest.approx(2 * (8_291_375_616 - size.packable) + 0.516 * size.packable, rel=1e-3)


def test_a_policy_shared_out_over_ranks_needs_its_share_and_the_layers_at_work() -> None:
    config = RunConfig.load("three-gpu", ["placement.shard_policy=true"])
    size = PUBLISHED_POLICIES[config.models.policy.path]
    needed = {}
    for ranks in (1, 2, 4):
        gpus = {f"cuda:{index}": Memory(80 * GIB, 80 * GIB) for index in range(3)}
        memory = {"cpu": ROOMY, **gpus}
        plan = plan_memory(config, resolve(config.placement, list(memory)), memory=memory, sharers=ranks)
        items = on(plan, "cuda:0")
        needed[ranks] = size_of(items, "weights")
        if ranks > 1:
            assert size_of(items, "layers put together") == int(3 * 2 * size.packable / size.layers)
    layers = 2 * size.packable
    assert needed[1] - needed[2] == layers // 2
    assert needed[1] - needed[4] == layers - layers // 4


def test_where_ranks_hold_a_whole_policy_that_does_not_fit_sharing_it_out_is_advised() -> None:
    config = RunConfig.load("three-gpu")
    memory = {"cpu": ROOMY} | {f"cuda:{index}": Memory(gib * GIB, gib * GIB) for index, gib in enumerate((16, 80, 8))}
    plan = plan_memory(config, resolve(config.placement, list(memory)), memory=memory, sharers=4)
    assert ("placement.shard_policy=true",) in [advice.settings for advice in plan.advice]


def test_memory_that_others_use_is_named_as_a_way_out() -> None:
    config = RunConfig.load("tiny")
    memory = {"cpu": Memory(GIB // 2, 8 * GIB)}
    plan = plan_memory(config, resolve(config.placement, ["cpu"]), memory=memory)
    assert refused(plan).endswith("or end what else uses that memory.")


TOO_MUCH = ("models.image.batch_size=512", "models.image.resolution=2048")  # about 900 GB to decode


def test_a_session_refuses_what_cannot_fit_before_anything_is_loaded() -> None:
    assert Plan(run_config()).memory.fits is True
    with pytest.raises(ConfigError, match=r"^cpu needs about \d+\.\d GiB .* set models\.image\."):
        Plan(run_config(*TOO_MUCH))


def test_doctor_shows_needed_against_there_and_what_would_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = examine(str(tmp_path / "runs.db"), "tiny", TOO_MUCH)
    memory = json.loads(json.dumps(findings))["memory"]
    assert memory["fits"] is False
    assert memory["advice"]
    assert any(problem.startswith("cpu needs about") for problem in findings["problems"])
    print_findings(findings)
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "decoding 512 pictures of 2048 x 2048 (estimate)" in out
    assert "It would fit with " in out


def test_doctor_plans_for_devices_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["placement.image=cuda:98,cuda:99", "placement.policy=cpu", "placement.reward=cpu"]
    findings = examine(str(tmp_path / "runs.db"), "tiny", overrides)
    assert findings["placement"].startswith("policy on cpu, image models on cuda:98 and cuda:99")
    needs = {device["device"]: device for device in findings["memory"]["devices"]}
    assert needs["cuda:98"]["needed_gib"] == needs["cuda:99"]["needed_gib"] > 0.6
    assert needs["cuda:98"]["free_gib"] is None
    assert [problem for problem in findings["problems"] if problem.startswith("placement.image is")]
    print_findings(findings)
    assert "not on this machine: can't say whether it fits" in capsys.readouterr().out
    config = RunConfig.load("tiny", overrides)
    assert plan_memory(config, intended(config.placement)).fits is None


def test_models_that_stream_on_one_device_need_their_memory_at_once_and_else_take_turns() -> None:
    def counted(streaming: str) -> dict[str, str]:
        plan = planned(f"training.streaming={streaming}", "placement.plan=one-gpu", preset="three-gpu", cuda0=140)
        return {item.what: item.part for item in on(plan, "cuda:0") if item.counted}

    in_turn, at_once = counted("auto"), counted("always")
    assert in_turn.items() < at_once.items()
    # Decoding pictures is the largest phase, which the others hide behind while they take turns.
    assert {part for what, part in at_once.items() if what not in in_turn} == {"policy", "reward"}


def test_the_pictures_that_are_remembered_take_no_more_than_their_setting_and_than_there_are() -> None:
    few = "evaluation.prompts=10"
    assert size_of(on(planned(few), "cpu"), "remembered of evaluations") == 5 * 10 * 2 * 3 * 96**2
    more = planned(few, "evaluation.every=5", "evaluation.validation_prompts=4")
    assert size_of(on(more, "cpu"), "remembered of evaluations") == 5 * 14 * 2 * 3 * 96**2
    assert size_of(on(planned("models.image.cache_mb=1"), "cpu"), "remembered of evaluations") == 10**6
    assert size_of(on(planned("models.image.cache_mb=0"), "cpu"), "remembered of evaluations") == 0


def test_pictures_are_held_until_their_evaluation_is_recorded_unless_they_are_remembered_anyway() -> None:
    def held_for(*overrides: str) -> int:
        few = ("evaluation.prompts=10", "evaluation.images_per_prompt=4", "models.image.batch_size=8")
        return size_of(on(planned(*few, *overrides), "cpu"), "of an evaluation until")

    each = 3 * 96**2
    assert held_for() == 0
    assert held_for("models.image.cache_mb=0") == 3 * 10 * 4 * each  # the baseline's arms: original, and two rewrites
    assert held_for("models.image.cache_mb=1") == 3 * 10 * 4 * each - 10**6
    validation = ("evaluation.every=5", "evaluation.validation_prompts=20")
    assert held_for("models.image.cache_mb=0", *validation) == 5 * 20 * 4 * each


def test_in_the_cpus_memory_small_tensors_keep_the_heap_as_large_as_they_made_it_and_large_ones_take_turns() -> None:
    def phase(name: str, small: int, large: int) -> list[Item]:
        return [estimate("policy", f"{name} small", small, 2**20), estimate("policy", f"{name} large", large, 2**25)]

    phases = [phase("sampling", 30, 100), phase("update", 50, 10), phase("rendering", 20, 400)]
    assert {item.what for item in at_once(phases, "cpu")} == {"update small", "rendering large"}
    assert {item.what for item in at_once(phases, "cuda:0")} == {"rendering small", "rendering large"}
    assert total(at_once(phases, "cpu")) == 450


def test_every_size_of_picture_batch_has_kernels_of_its_own_on_a_cpu_and_none_on_a_gpu() -> None:
    def kernels(*overrides: str, **gpus: int) -> list[int]:
        items = on(planned("models.image.dtype=bfloat16", *overrides, **gpus), "cpu")
        return [item.bytes or 0 for item in items if item.what.startswith("kernels compiled for ")]

    few, many, most = (kernels(f"training.steps={steps}")[0] for steps in (2, 10, 1000))
    assert 0 < few < many < most
    assert most == kernels("training.steps=100000")[0], "no more sizes than pictures in a batch"
    assert kernels("models.image.dtype=float32")[0] < most / 3
    assert len(kernels("models.policy.dtype=float32")) == 1
    assert len(kernels("models.policy.dtype=bfloat16")) == 2
    assert kernels("placement.plan=one-gpu", "models.policy.dtype=bfloat16", cuda0=80) == []


def test_what_goes_through_the_policy_at_once_is_counted_token_by_token() -> None:
    two = UpdatePass(rows=6, groups=2)  # prompts of 5 tokens, rewrites of 4, the last of which nothing follows
    assert two.tokens(5, 4) == 2 * 5 + 6 * 3
    assert two.keys(5, 4) == 2 * 5 + 6 * (5 + 3)
    assert two.pairs(5, 4) == 2 * 5 * 5 + 6 * 3 * (5 + 3)
    for rollouts, batch, rows, expected in (
        (12, 4, 0, UpdatePass(rows=12, groups=1)),  # a group by itself
        (12, 4, 3, UpdatePass(rows=3, groups=1)),  # a part of one
        (12, 4, 32, UpdatePass(rows=24, groups=2)),  # whole groups only
        (12, 2, 99, UpdatePass(rows=24, groups=2)),  # no more than there are
    ):
        sizes = [f"sampling.num_rollouts={rollouts}", f"training.batch_size={batch}", f"training.update_rows={rows}"]
        assert update_pass(RunConfig.load("tiny", sizes)) == expected
