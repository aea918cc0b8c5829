"""Every setting of a run, in one validated tree.

:class:`RunConfig` is the single source of truth: the command line, the app's form and its help texts, the
saved ``config.yaml`` and the memory plan all read it. Unknown keys, wrong types and impossible values are
refused by :meth:`RunConfig.load` in one sentence each, before any model is touched. A field's unit and
meaning stand in its description; ``json_schema_extra={"advanced": True}`` keeps a field out of the short form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "configs"
DEFAULT_PRESET = "tiny"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """A setting that can't be used; the message is one plain sentence for each problem."""


class Section(BaseModel):
    """A group of settings: unknown keys refused, immutable once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _f(default: Any, text: str, *, advanced: bool = False, **bounds: Any) -> Any:
    """A field with its help text; ``bounds`` are pydantic's (ge, le, gt, lt, min_length...)."""
    return Field(default, description=text, json_schema_extra={"advanced": advanced}, **bounds)


class LoraConfig(Section):
    """Low-rank adapter on the policy's language model."""

    rank: int = _f(16, "Rank of the adapter matrices.", ge=1, le=512)
    alpha: float = _f(32.0, "Scale of the adapter: its output is multiplied by alpha / rank.", gt=0, le=4096)
    dropout: float = _f(
        0.0,
        "Dropout on the adapter's input. Above 0 the policy that is updated differs from the one that sampled.",
        ge=0.0,
        lt=1.0,
        advanced=True,
    )
    targets: Literal["attention", "all-linear"] = _f(
        "all-linear",
        "Which linear layers of the language model get an adapter; the vision tower never does.",
        advanced=True,
    )


class PolicyModelConfig(Section):
    """The vision-language model that rewrites prompts."""

    path: str = _f("tiny", "'tiny' (embedded), a folder, or a hub id such as Qwen/Qwen2-VL-7B-Instruct.", min_length=1)
    dtype: Dtype = _f("float32", "Number format of the weights; 'auto' is bfloat16 on a GPU, float32 on a CPU.")
    quantize: Literal["none", "4bit"] = _f(
        "none",
        "'4bit' keeps the language model's weights in 4 bits under the adapter (bitsandbytes, GPU only): a third of "
        "the memory, slower.",
        advanced=True,
    )
    adapter: Literal["lora", "full"] = _f("lora", "Train a low-rank adapter, or all weights of the language model.")
    lora: LoraConfig = LoraConfig()
    system: str = _f("", "System message of the chat template; empty = none.", advanced=True)
    template: str = _f(
        "{prompt}",
        "What the policy is told, once per prompt; {prompt} stands for the user's text.",
        advanced=True,
        min_length=8,
    )
    question: str = _f(
        "Does this picture show {prompt}? Answer Yes or No.",
        "What the judge asks about a picture; {prompt} stands for the original prompt.",
        advanced=True,
        min_length=8,
    )
    gradient_checkpointing: bool = _f(
        False, "Recompute activations in the backward pass: less memory, slower.", advanced=True
    )

    @model_validator(mode="after")
    def _template_names_the_prompt(self) -> PolicyModelConfig:
        for name in ("template", "question"):
            if getattr(self, name).count("{prompt}") != 1:
                raise ValueError(f"{name} must contain {{prompt}} exactly once")
        return self

    @model_validator(mode="after")
    def _trained_weights_are_whole(self) -> PolicyModelConfig:
        if self.quantize != "none" and self.adapter == "full":
            raise ValueError(
                "quantize is '4bit', but adapter is 'full', and weights of 4 bits can't be trained; set "
                "models.policy.adapter to 'lora', or quantize to 'none'"
            )
        return self


class ImageModelConfig(Section):
    """The text-to-image model that renders every rewrite."""

    path: str = _f(
        "tiny", "'tiny' (embedded), a folder, or a hub id of a diffusers text-to-image pipeline.", min_length=1
    )
    dtype: Dtype = _f("auto", "Number format; 'auto' is bfloat16 where the device computes it in hardware.")
    steps: int = _f(10, "Denoising steps a picture.", ge=1, le=200)
    guidance: float = _f(3.5, "Classifier-free guidance scale; 1 = off.", ge=1.0, le=30.0)
    resolution: int = _f(96, "Side of the square picture, in pixels; a multiple of 16.", ge=32, le=2048, multiple_of=16)
    negative_prompt: str = _f("", "What guidance steers away from.", advanced=True)
    max_sequence_length: int = _f(
        0,
        "Tokens of the T5 part of the prompt, zeros when T5 is absent; 0 = none.",
        ge=0,
        le=512,
        advanced=True,
    )
    use_t5: bool = _f(
        False,
        "Load the T5 text encoder of SD3 or FLUX, which reads beyond 77 tokens (9 GB in bfloat16).",
        advanced=True,
    )
    t5_on_cpu: bool = _f(
        False, "Keep T5 in the host's memory and encode there: 9 GB less on the GPU, seconds a new text.", advanced=True
    )
    batch_size: int = _f(
        32,
        "Most pictures rendered at once; 0 = as many of a step as the memory plan says fit. Halved where memory runs "
        "out. On a device of its own, less than a step lets the update begin while the rest is rendered.",
        ge=0,
        le=512,
        advanced=True,
    )
    decode_batch_size: int = _f(
        0, "Most pictures decoded from their latents at once; 0 = all of a batch.", ge=0, le=512, advanced=True
    )
    decode_tile: int = _f(
        0,
        "Side in pixels of the overlapping tiles a larger picture is decoded in; 0 = whole. Seams may show faintly.",
        ge=0,
        le=2048,
        multiple_of=64,
        advanced=True,
    )
    compile: bool = _f(
        False,
        "Compile the denoiser (torch.compile): faster steps after minutes at the start, pictures differ by rounding.",
        advanced=True,
    )
    cache_mb: int = _f(
        256,
        "Pictures kept in memory, in megabytes, so that evaluations on the same prompts and latents render them once; "
        "0 = none.",
        ge=0,
        le=1_000_000,
        advanced=True,
    )


class RewardWeights(Section):
    """Weight of each named part of the reward; 0 = recorded but not optimised."""

    clip: float = _f(1.0, "100 x cosine similarity of the picture to the original prompt.", ge=-100, le=100)
    length: float = _f(0.0, "Minus the rewrite's words beyond length_limit.", ge=-100, le=100)
    format: float = _f(0.0, "1 for a rewrite that could be parsed, else 0.", ge=-100, le=100)
    aesthetic: float = _f(
        0.0,
        "What a linear head on CLIP's picture embedding (models.reward.aesthetic) says, about 1 to 10; not computed "
        "at 0 unless that head is named.",
        ge=-100,
        le=100,
        advanced=True,
    )
    vqa: float = _f(
        0.0,
        "Probability (0..1) that the untrained policy, asked about the picture, says Yes; not computed at 0. Above 0 "
        "the judge 'vqa' is no longer independent of the reward.",
        ge=-100,
        le=100,
        advanced=True,
    )


class RewardModelConfig(Section):
    """The model that scores each picture against the original prompt."""

    path: str = _f(
        "tiny",
        "'tiny' (embedded), a folder, an open_clip model name such as ViT-B-32 or ViT-B-16-SigLIP, or hf-hub: and a "
        "hub id.",
        min_length=1,
    )
    pretrained: str = _f(
        "", "open_clip's tag of the weights, e.g. openai, or a file of weights; empty for 'tiny', a folder or hf-hub:."
    )
    aesthetic: str = _f(
        "",
        "Weights of a linear head on this model's picture embedding, such as LAION's aesthetic predictor: a file, or "
        "owner/name/file on the hub; empty = none.",
        advanced=True,
    )
    dtype: Dtype = _f("float32", "Number format; 'auto' is bfloat16 on a GPU, float32 on a CPU.", advanced=True)
    batch_size: int = _f(64, "Most pictures scored at once.", ge=1, le=4096, advanced=True)
    weights: RewardWeights = RewardWeights()
    length_limit: int = _f(40, "Words a rewrite may have before the length part turns negative.", ge=1, le=1000)
    failure: float = _f(
        0.0,
        "Reward of a completion that can't be parsed, so that it has no picture.",
        ge=-1000,
        le=1000,
        advanced=True,
    )
    debug: Literal["none", "shuffle"] = _f(
        "none",
        "'shuffle' deals the rewards of a group out at random: a negative control, in which what changes is drift.",
        advanced=True,
    )

    @model_validator(mode="after")
    def _weighted_parts_have_a_model(self) -> RewardModelConfig:
        if self.weights.aesthetic and not self.aesthetic:
            raise ValueError(
                "weights.aesthetic is not 0, but no head is named that could compute it; name the file of its weights "
                "in models.reward.aesthetic"
            )
        return self


class ModelsConfig(Section):
    """The three models."""

    policy: PolicyModelConfig = PolicyModelConfig()
    image: ImageModelConfig = ImageModelConfig()
    reward: RewardModelConfig = RewardModelConfig()


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Devices = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?(, ?cuda(:\d+)?)*)$")]


class PlacementConfig(Section):
    """Which device holds which model."""

    plan: Literal["auto", "three-gpu", "balanced", "two-gpu", "one-gpu", "cpu", "explicit"] = _f(
        "auto",
        "Who sits where: 'auto' takes the plan for the GPUs there are (one model each from three on), 'balanced' has "
        "two image models, 'explicit' leaves it to the three devices below.",
    )
    policy: Device = _f("auto", "Device of the policy in place of the plan's: auto, cpu, cuda:0, ...")
    image: Devices = _f(
        "auto", "Device of the image model in place of the plan's; several with commas, for as many image models."
    )
    reward: Device = _f("auto", "Device of the reward model in place of the plan's.")
    gpus_per_cell: int = _f(
        0,
        "With several ranks on a machine: GPUs of each, rank 0 the first ones; 0 = as many as the plan needs.",
        ge=0,
        le=64,
        advanced=True,
    )
    shard_policy: bool = _f(
        False,
        "With several ranks: share the policy's weights out over them, for a policy that outgrows one GPU. Each rank "
        "holds a part of every layer and fetches the rest as it computes: slower, the same result.",
        advanced=True,
    )
    threads: int = _f(0, "CPU threads of the whole process; 0 = as many as cores.", ge=0, le=1024, advanced=True)

    @model_validator(mode="after")
    def _devices_are_named(self) -> PlacementConfig:
        unnamed = [role for role in ("policy", "image", "reward") if getattr(self, role) == "auto"]
        if self.plan == "explicit" and unnamed:
            raise ValueError(
                f"plan is 'explicit', but no device is named for {' and '.join(unnamed)}; name one (cpu, cuda:0, ...) "
                "or set placement.plan to 'auto'"
            )
        names = ["cuda:0" if name == "cuda" else name for name in self.image.replace(" ", "").split(",")]
        if len(set(names)) < len(names):
            raise ValueError(f"image is {self.image!r}, which names a device twice; give every image model its own")
        return self


class SamplingConfig(Section):
    """How the policy writes."""

    num_rollouts: int = _f(8, "Rewrites a prompt: the size of a group.", ge=2, le=256)
    max_new_tokens: int = _f(24, "Most tokens of a rewrite.", ge=1, le=1024)
    temperature: float = _f(1.0, "Divides the logits; above 1 = more varied.", gt=0.0, le=10.0)
    top_k: int = _f(0, "Keep only this many likeliest tokens; 0 = all.", ge=0, le=1_000_000)
    top_p: float = _f(1.0, "Keep the likeliest tokens that together reach this probability; 1 = all.", gt=0.0, le=1.0)
    prompts_per_pass: int = _f(
        0,
        "Prompts sampled side by side; 0 = the whole batch. Fewer need less memory, and with streaming the first "
        "pictures begin earlier.",
        ge=0,
        le=4096,
        advanced=True,
    )


class ObjectiveConfig(Section):
    """The loss: policy + kl_coef x KL - entropy_coef x entropy."""

    kind: Literal["grpo", "gspo", "cispo"] = _f("grpo", "Token-level clipped ratio, sequence ratio, or CISPO.")
    scale: Literal["group", "batch", "none"] = _f(
        "group", "What the centred rewards are divided by: the group's spread, the batch's, or nothing."
    )
    baseline: Literal["mean", "leave_one_out"] = _f("mean", "The group's mean (GRPO) or the mean of the others (RLOO).")
    aggregation: Literal["sequence", "token", "constant"] = _f(
        "sequence",
        "How token losses become one number: mean of sequence means, mean of all tokens, or sum / constant.",
    )
    kl_coef: float = _f(0.02, "Weight of the KL penalty towards the untrained policy.", ge=0.0, le=100.0)
    kl_estimator: Literal["k1", "k2", "k3"] = _f("k3", "Per-token estimator of the KL divergence.", advanced=True)
    clip_ratio: float = _f(0.2, "The probability ratio is clipped to 1 - this and 1 + this.", gt=0.0, lt=1.0)
    clip_low: float | None = _f(None, "Lower clip where it differs from clip_ratio.", gt=0.0, lt=1.0, advanced=True)
    clip_high: float | None = _f(
        None,
        "Upper clip where it differs from clip_ratio (DAPO's clip-higher); for cispo the cap of the ratio itself.",
        gt=0.0,
        le=100.0,
        advanced=True,
    )
    entropy_coef: float = _f(0.01, "Weight of the entropy bonus.", ge=0.0, le=10.0)
    epsilon: float = _f(1e-8, "Added to the spread before dividing by it.", ge=0.0, le=1.0, advanced=True)
    unbiased: bool = _f(False, "Spread with n - 1 (sample) and not n (population).", advanced=True)
    min_std: float = _f(
        1e-6,
        "A group whose rewards spread no more than this teaches nothing: advantage 0.",
        ge=0.0,
        advanced=True,
    )
    dynamic_sampling: int = _f(
        0,
        "How many times a prompt whose group has no spread is replaced by another (DAPO); 0 = never.",
        ge=0,
        le=20,
    )

    @property
    def clips(self) -> tuple[float, float]:
        """(low, high) as the loss takes them."""
        low = self.clip_ratio if self.clip_low is None else self.clip_low
        if self.clip_high is not None:
            return low, self.clip_high
        return low, 1.0 + self.clip_ratio if self.kind == "cispo" else self.clip_ratio


class TrainingConfig(Section):
    """The optimiser and the length of the run."""

    steps: int = _f(100, "Optimiser steps (with inner_epochs > 1: batches of fresh rewrites).", ge=1, le=10_000_000)
    batch_size: int = _f(4, "Prompts a step.", ge=1, le=4096)
    learning_rate: float = _f(1e-6, "AdamW's step size at its peak.", gt=0.0, le=1.0)
    warmup_steps: int = _f(5, "Steps over which the rate rises from 0.", ge=0, le=1_000_000, advanced=True)
    schedule: Literal["constant", "linear", "cosine"] = _f(
        "constant", "How the rate falls after the warm-up.", advanced=True
    )
    weight_decay: float = _f(0.0, "AdamW's decoupled weight decay.", ge=0.0, le=1.0, advanced=True)
    beta1: float = _f(0.9, "AdamW's first moment decay.", ge=0.0, lt=1.0, advanced=True)
    beta2: float = _f(0.99, "AdamW's second moment decay.", ge=0.0, lt=1.0, advanced=True)
    max_grad_norm: float = _f(1.0, "Gradients are scaled down to this norm.", gt=0.0, le=1e6, advanced=True)
    inner_epochs: int = _f(1, "Optimiser passes over each batch of rewrites.", ge=1, le=64, advanced=True)
    minibatches: int = _f(1, "Optimiser steps each pass is cut into, by whole groups.", ge=1, le=256, advanced=True)
    update_rows: int = _f(
        0,
        "Most rewrites in one forward-backward: fewer than a group has cut it, several times as many take whole groups "
        "together; 0 = a group. Never changes the result.",
        ge=0,
        le=4096,
        advanced=True,
    )
    logit_chunk: int = _f(
        0,
        "Most tokens whose logits are there at once in the update; 0 = all of a forward-backward. Chunks need less "
        "memory and compute the logits twice; never changes the result.",
        ge=0,
        le=1_000_000,
        advanced=True,
    )
    streaming: Literal["auto", "always", "never"] = _f(
        "auto",
        "Render and score on their devices while the policy updates on the groups that are ready. 'auto' where they "
        "have devices of their own; 'always' also beside the policy on one device, which then needs the memory of all "
        "at once. Never changes the result.",
        advanced=True,
    )
    async_steps: int = _f(
        0,
        "1 = the next step's rewrites are sampled and rendered before the update they will follow, so that no device "
        "waits for the update. They are one step stale, which the probability ratio corrects for.",
        ge=0,
        le=1,
        advanced=True,
    )
    max_bad_steps: int = _f(
        3,
        "Steps in a row with a non-finite loss or gradient after which the run fails.",
        ge=1,
        le=100,
        advanced=True,
    )


class DataConfig(Section):
    """Where prompts come from."""

    prompts: str = _f("tiny", "Prompt set: a name in configs/prompts or a path (JSONL, TXT, CSV).", min_length=1)
    tiers: tuple[Literal["basic", "challenging", "complex"], ...] = _f(
        ("basic", "challenging", "complex"), "Difficulties to train on and evaluate.", min_length=1
    )
    max_train_prompts: int = _f(
        0, "Use only this many training prompts, each tier its share; 0 = all.", ge=0, advanced=True
    )
    max_prompt_chars: int = _f(400, "Longest prompt accepted, in characters.", ge=8, le=20_000, advanced=True)


class EvaluationConfig(Section):
    """The three-arm comparison on held-out prompts."""

    prompts: int = _f(
        100, "Held-out test prompts measured, each tier its share; fewer when the set has fewer.", ge=2, le=100_000
    )
    images_per_prompt: int = _f(2, "Pictures a prompt and arm, on latents that the arms share.", ge=1, le=64)
    samples: int = _f(2, "Sampled rewrites a prompt (spread over its latents).", ge=0, le=64)
    greedy: bool = _f(True, "Also measure the policy's likeliest rewrite.")
    every: int = _f(0, "Evaluate on validation prompts every this many steps; 0 = never.", ge=0, le=1_000_000)
    validation_prompts: int = _f(
        12, "Validation prompts measured then, each tier its share.", ge=2, le=100_000, advanced=True
    )
    bootstrap: int = _f(10_000, "Bootstrap resamples of the interval.", ge=100, le=1_000_000, advanced=True)
    confidence: float = _f(0.95, "Coverage of the interval.", gt=0.5, lt=1.0, advanced=True)
    judge: Literal["auto", "checker", "vqa", "none"] = _f(
        "auto", "Second metric, never optimised: the tiny world's checker, the policy asked Yes/No, or none."
    )


class RecordingConfig(Section):
    """What is kept of a run."""

    name: str = _f("", "Name of the run; empty = made from its number.", max_length=120)
    tags: tuple[str, ...] = _f((), "Labels to find the run by.")
    images_every: int = _f(1, "Keep the pictures of every n-th step; 0 = none.", ge=0, le=1_000_000)
    tokens: bool = _f(True, "Keep per-token log-probabilities and entropies.", advanced=True)
    checkpoint_every: int = _f(20, "Steps between checkpoints.", ge=1, le=1_000_000)
    keep_checkpoints: int = _f(2, "Most recent checkpoints kept beside the best one.", ge=1, le=1000, advanced=True)
    image_format: Literal["png", "webp"] = _f("png", "File format of the pictures.", advanced=True)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = _f(
        (), "Where the metrics go besides runs.db; each is a package of its own.", advanced=True
    )
    project: str = _f(
        "pure-grpo-prompts",
        "Project (W&B, trackio) or experiment (MLflow) that trackers put the run in.",
        advanced=True,
        min_length=1,
        max_length=120,
    )


class RunConfig(Section):
    """Every setting of a run."""

    preset: str = _f(DEFAULT_PRESET, "Preset these settings started from.", advanced=True)
    seed: int = _f(0, "Everything random in the run is derived from this number.", ge=0, lt=2**63)
    models: ModelsConfig = ModelsConfig()
    placement: PlacementConfig = PlacementConfig()
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    recording: RecordingConfig = RecordingConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        if self.training.minibatches > self.training.batch_size:
            raise ValueError(
                f"training.minibatches is {self.training.minibatches}, but a step has only "
                f"{self.training.batch_size} groups (training.batch_size); use at most that many"
            )
        if self.training.async_steps and self.objective.dynamic_sampling:
            raise ValueError(
                "training.async_steps is 1, but objective.dynamic_sampling would wait for the rewards before the "
                "update; set one of the two to 0"
            )
        if self.training.async_steps and self.training.streaming == "never":
            raise ValueError(
                "training.async_steps is 1, but with training.streaming 'never' nothing is rendered beside the update; "
                "use 'auto' or set training.async_steps to 0"
            )
        if self.placement.shard_policy and self.models.policy.quantize != "none":
            raise ValueError(
                "placement.shard_policy is true, but models.policy.quantize is '4bit', and weights of 4 bits can't be "
                "shared out over ranks; set models.policy.quantize to 'none', or placement.shard_policy to false"
            )
        if not self.evaluation.greedy and self.evaluation.samples == 0:
            raise ValueError("evaluation measures nothing: set evaluation.greedy or evaluation.samples above 0")
        if self.evaluation.samples > self.evaluation.images_per_prompt:
            raise ValueError(
                f"evaluation.samples is {self.evaluation.samples}, more than evaluation.images_per_prompt "
                f"({self.evaluation.images_per_prompt}); each sample needs a picture of its own"
            )
        if self.evaluation.judge == "vqa" and self.models.reward.weights.vqa:
            raise ValueError(
                "evaluation.judge is 'vqa', but models.reward.weights.vqa trains on the same question, so it would "
                "judge nothing; use another judge ('checker' or 'none'), or set that weight to 0"
            )
        return self

    @classmethod
    def load(cls, preset_or_path: str | Path = DEFAULT_PRESET, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a preset (a name in ``configs/``) or a YAML file, apply ``section.field=value`` overrides, validate.

        ``objective=dapo`` stands for the settings of that method (:data:`~grpo_engine.methods.METHODS`); what follows
        it may change them one by one.

        Raises:
            ConfigError: one sentence for each problem, naming the field, the value and what is allowed.
        """
        path = find_preset(preset_or_path)
        data = _read_yaml(path)
        data.setdefault("preset", path.stem)
        if isinstance(data.get("objective"), str):
            data["objective"] = _method(data["objective"])
        for override in overrides:
            _apply(data, override)
        return cls.parse(data)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> RunConfig:
        """Validate plain data; raises :class:`ConfigError` like :meth:`load`."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError("\n".join(sentence for _, sentence in _problems(error))) from error

    def dump_yaml(self) -> str:
        """All settings as YAML, as saved beside a run; :meth:`load` reads it back to an equal value."""
        data = self.model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        if any(mark in text for mark in "\x85\u2028\u2029"):  # read back as line breaks, which fold into spaces
            text = yaml.safe_dump(data, sort_keys=False)
        return text

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that differ: dotted name -> (this, other)."""
        mine, theirs = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}

    def as_overrides(self, base: RunConfig | None = None) -> list[str]:
        """The ``--set`` arguments that rebuild this configuration from ``base``; without it, from its preset."""
        base = base or type(self).load(self.preset if self.preset in preset_names() else DEFAULT_PRESET)
        changed = self.differences(base)
        return [f"{key}={json.dumps(mine, ensure_ascii=False)}" for key, (mine, _) in changed.items()]


def find_problems(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :meth:`RunConfig.parse` would refuse: (dotted name of the setting or section, sentence) each.

    The name is empty where settings of several sections do not fit together.
    """
    try:
        RunConfig.model_validate(dict(data))
    except ValidationError as error:
        return _problems(error)
    return []


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def preset_names() -> list[str]:
    """Names of the shipped presets, the default first."""
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    return sorted(names, key=lambda name: name != DEFAULT_PRESET)


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder in the place of ``~``.

    Raises:
        ConfigError: it is the home of somebody unknown here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{str(path)!r} names no home folder; write the folder out.") from error


def find_preset(preset_or_path: str | Path) -> Path:
    """The YAML file a preset's name or a path stands for."""
    named = PRESETS / f"{preset_or_path}.yaml"
    if named.is_file():
        return named
    path = expanded(preset_or_path)
    if path.is_file():
        return path
    raise ConfigError(
        f"There is no configuration {str(preset_or_path)!r}: give a YAML file or one of the presets "
        f"{', '.join(preset_names())}."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{path}{line} is not valid YAML text; correct it there or start from a preset.") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); correct that or start from a preset.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings as 'name: value' lines, not {type(data).__name__}.")
    return data


def read_override(override: str) -> tuple[str, Any]:
    """Name and value of one ``section.field=value``; the value is read as YAML. Raises ConfigError."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set takes section.field=value, not {override!r}.")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The value in --set {override!r} can't be read; put quotes around text.") from error
    if isinstance(value, str) and value == text.strip():  # text in quotes is meant as text
        value = _number(value)
    return name.strip(), value


def _apply(data: dict[str, Any], override: str) -> None:
    """Write one ``section.field=value`` into nested ``data``."""
    name, value = read_override(override)
    if name == "objective" and isinstance(value, str):
        parts = data.get("objective")
        data["objective"] = (parts if isinstance(parts, dict) else {}) | _method(value)
        return
    *parents, leaf = name.split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {name}: {parent!r} is a setting, not a section.")
        node = child
    node[leaf] = value


def _method(name: str) -> dict[str, Any]:
    if name not in METHODS:
        raise ConfigError(
            f"objective is {name!r}, but no method is known by that name; use {', '.join(METHODS)}, or set its parts, "
            "such as objective.scale=none."
        )
    return dict(METHODS[name])


def _number(text: str) -> str | float:
    """YAML 1.1 reads ``1e-6`` as text; people mean the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    """(field, sentence) of each problem."""
    found = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentence = f"There is no setting {field!r}{_suggest(field)}"
        elif problem["type"] == "value_error":
            sentence = f"{field + ': ' if field else ''}{problem['ctx']['error']}."
        else:
            if problem["type"] == "string_pattern_mismatch":
                allowed = "should be auto, cpu, cuda or cuda:0, cuda:1, ..."
            else:
                allowed = "should " + problem["msg"].partition(" should ")[2]
            sentence = f"{field} is {problem['input']!r}, but it {allowed}."
        found.append((field, sentence))
    return found


def _suggest(field: str) -> str:
    import difflib

    known = list(flatten(RunConfig().model_dump(mode="json")))
    close = [name for name in known if name.rsplit(".", 1)[-1] == field.rsplit(".", 1)[-1]]
    close = close or difflib.get_close_matches(field, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
