"""Every family of policies samples, computes log-probabilities, judges and trains as the embedded one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import equal, fresh_environment, small, trainer, weights
from model_folders import CONFIGS, FAMILIES, LAYERS, write_policy
from safetensors import safe_open
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from grpo_engine.config import ConfigError
from grpo_engine.loading import load_policy
from grpo_engine.model_sizes import policy_size
from grpo_engine.policy import PureGRPOPolicy
from grpo_engine.policy_family import adapter_layers, require_text_side
from grpo_engine.rollout import Completions
from grpo_engine.seeding import normals

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "two small blue stars on a white background")
BaseOf = Callable[[PureGRPOPolicy], Any]
Load = Callable[..., PureGRPOPolicy]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of each family; that of Qwen2.5-VL in several files."""
    torch.set_num_threads(1)
    shard = "60KB" if request.param == "qwen2_5_vl" else "5GB"
    return write_policy(tmp_path_factory.mktemp("models") / request.param, request.param, shard=shard)


@pytest.fixture
def load(folder: Path) -> Load:
    """``load("sampling.top_k=5", ...)``: the policy in the folder, its adapter moved away from zero."""

    def loaded(*overrides: str) -> PureGRPOPolicy:
        policy = load_policy(small(f"models.policy.path={folder}", *overrides), CPU)
        with torch.no_grad():
            for index, parameter in enumerate(policy.trainable().values()):
                parameter += 0.05 * normals(index, parameter.shape)
        return policy

    return loaded


def sample(policy: PureGRPOPolicy, *, greedy: bool = False) -> list[Completions]:
    return policy.sample(PROMPTS, [[1, 2, 3], [4, 5, 6]], greedy=greedy)


def picture(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_the_weights_are_those_of_the_published_names(folder: Path, base_of: BaseOf, load: Load) -> None:
    stored: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    family = folder.name
    assert (len(files) > 2) == (family == "qwen2_5_vl") == (folder / "model.safetensors.index.json").is_file()
    first = {"qwen3_vl": "model.language_model.", "llava": "language_model.model."}.get(family, "model.")
    loaded = base_of(load()).model
    name = "layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        stored[first + name], loaded.language_model.get_parameter("layers.0.self_attn.q_proj.base_layer.weight")
    )
    assert policy_size(str(folder)).weights.elements == sum(tensor.numel() for tensor in stored.values())


def test_the_whole_model_gives_the_sampled_log_probabilities(load: Load, base_of: BaseOf) -> None:
    """By the model's own forward pass, which finds its positions by itself: one sequence, no cache."""
    policy = load("sampling.temperature=1.3")
    groups = sample(policy)
    for group in groups:
        for row in range(3):
            tokens = group.token_ids[row][group.mask[row]]
            ids = torch.cat([group.prompt_ids, tokens])
            with torch.no_grad():
                logits = base_of(policy)(input_ids=ids.unsqueeze(0)).logits[0, len(group.prompt_ids) - 1 : -1]
            allowed = (logits.float() / 1.3).masked_fill(policy.suppressed, -torch.inf).log_softmax(-1)
            expected = allowed.gather(1, tokens.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(group.logprobs[row][group.mask[row]], expected, atol=1e-4, rtol=0)
    again, _ = policy.token_logprobs(groups[0])
    torch.testing.assert_close(again.detach(), groups[0].logprobs, atol=1e-4, rtol=0)


def test_no_special_token_but_the_end_is_ever_sampled(folder: Path, load: Load, base_of: BaseOf) -> None:
    policy = load()
    config = CONFIGS[folder.name]
    placeholders = [value for name, value in config.items() if name.endswith(("token_id", "token_index"))]
    placeholders = [value for value in placeholders if value != 1004]
    assert len(placeholders) >= (1 if folder.name == "llava" else 4)
    assert policy.end_tokens == [1002, 1004]
    assert policy.suppressed[placeholders].all()
    assert not policy.suppressed[policy.end_tokens].any()
    assert int(policy.suppressed.sum()) < 20
    wanted = config.get("image_token_id", config.get("image_token_index"))
    handle = base_of(policy).lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([wanted]), 1e3)
    )
    groups = sample(policy)
    handle.remove()
    assert not any((group.token_ids[group.mask] == wanted).any() for group in groups)


@pytest.mark.parametrize("truncation", [(), ("sampling.temperature=1.2", "sampling.top_k=30", "sampling.top_p=0.9")])
def test_sharing_the_prompt_or_recomputing_activations_changes_neither_numbers_nor_gradient(
    load: Load, truncation: tuple[str, ...]
) -> None:
    results, gradients = [], []
    groups: list[Completions] = []
    for share, recompute in ((False, False), (True, False), (True, True)):
        policy = load(f"models.policy.gradient_checkpointing={str(recompute).lower()}", *truncation)
        groups = groups or sample(policy)
        policy.model.train()
        measured = [policy.token_logprobs(group, share_prefix=share) for group in groups]
        sum((logprobs.sum() + 0.1 * entropies.sum() for logprobs, entropies in measured), torch.zeros(())).backward()
        results.append(torch.cat([torch.stack(pair).flatten() for pair in measured]).detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.trainable().values()]))
    for other in (1, 2):
        torch.testing.assert_close(results[other], results[0], atol=2e-4, rtol=0)
        assert float((gradients[other] - gradients[0]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.parametrize(("targets", "count"), [("attention", 4), ("all-linear", 7)])
def test_adapters_stand_on_every_language_layer_and_none_on_the_vision_tower(
    folder: Path, load: Load, base_of: BaseOf, targets: str, count: int
) -> None:
    policy = load(f"models.policy.lora.targets={targets}")
    assert len(policy.adapted_layers) == LAYERS * count
    assert all("language_model" in name for name in policy.trainable())
    outside = [name for name, _ in base_of(policy).model.named_modules() if "language_model" not in name]
    assert not any("lora" in name for name in outside)
    alike = [name for name in outside if name.endswith(("q_proj", "gate_proj"))]
    assert bool(alike) == (folder.name in ("qwen2_5_vl", "llava"))  # else there is nothing to mistake
    size = policy_size(str(folder)).adapter(policy.config.lora.rank, targets)
    assert sum(parameter.numel() for parameter in policy.trainable().values()) == size


def test_the_judge_reads_the_picture_and_leaves_no_trace(load: Load, base_of: BaseOf) -> None:
    policy = load()
    (group, _) = before = sample(policy)
    answers = policy.probability_of_yes([picture(0), picture(1), picture(0)], [PROMPTS[0]] * 3)
    assert all(0.0 < answer < 1.0 for answer in answers)
    assert answers[0] == answers[2] != answers[1]
    question = policy.config.question.replace("{prompt}", PROMPTS[0])
    chat = policy.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = policy.processor(text=[chat], images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        logits = base_of(policy)(**inputs).logits[0, -1]
    yes, no = (policy.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    assert answers[0] == pytest.approx(float(logits[[yes, no]].double().softmax(0)[0]), abs=1e-5)
    assert getattr(base_of(policy).model, "rope_deltas", None) is not None or "llava" in policy.processor_path
    policy.probability_of_yes([picture(0)], PROMPTS[:1])
    assert getattr(base_of(policy).model, "rope_deltas", None) is None
    for one, other in zip(sample(policy), before, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.logprobs, other.logprobs)
    with torch.no_grad():
        assert torch.isfinite(policy.token_logprobs(group)[0]).all()


def test_two_training_steps_with_the_embedded_image_model_and_reward(folder: Path) -> None:
    config = small(
        f"models.policy.path={folder}", "training.steps=2", "training.learning_rate=1e-2", "sampling.max_new_tokens=6"
    )
    trained, recorder = trainer(config, loaded=fresh_environment(config))
    before = weights(trained)
    trained.train()
    assert not equal(weights(trained), before)
    first, second = recorder.metrics
    assert (first["ratio_error"] or 0.0) < 1e-4 and (second["ratio_error"] or 0.0) < 1e-4
    assert first["skipped"] == second["skipped"] == 0.0
    assert (first["grad_norm"] or 0.0) > 0.0
    assert (first["kl_penalty"] or 0.0) == pytest.approx(0.0, abs=1e-6) and (second["kl_penalty"] or 0.0) > 0.0
    groups = [group for groups in recorder.groups for group in groups]
    assert all(len(group.pictures) == 3 and "clip" in group.scores[0].parts for group in groups)


def test_a_vision_tower_beside_a_text_model_gets_no_adapter() -> None:
    """Idefics3 and SmolVLM call their text side ``text_model`` and have ``q_proj`` on both sides."""
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        model = SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text | heads, vision_config=vision))
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    names = adapter_layers(model, "all-linear")
    assert len(names) == 2 * 7 and all(name.startswith("model.text_model.") for name in names)


def test_a_family_whose_text_side_works_differently_is_refused_before_training(tmp_path: Path, base_of: BaseOf) -> None:
    folder = write_policy(tmp_path / "llava", "llava")
    policy = load_policy(small(f"models.policy.path={folder}"), CPU)
    model = base_of(policy)
    require_text_side(model, policy.tokenizer, str(folder))
    inner = model.forward
    model.forward = lambda *args, **named: _scaled(inner(*args, **named))
    with pytest.raises(ConfigError, match="LlavaForConditionalGeneration, whose text side does not work"):
        require_text_side(model, policy.tokenizer, str(folder))


def _scaled(output: Any) -> Any:
    output.logits = output.logits * 0.5  # as families do that scale their logits
    return output


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "plain", "qwen2_5_vl")
    (folder / "chat_template.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no chat template; use an instruct model"):
        load_policy(small(f"models.policy.path={folder}"), CPU)
