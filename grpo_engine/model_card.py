"""The README of an export: what it is, what it gained, how it was trained, and lines of Python that use it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from .checkpoint_folder import CheckpointState
from .config import RunConfig
from .environment import QUOTES

Format = Literal["peft", "merged", "pth"]

PTH_FILE = "pure_grpo_policy.pth"
BASE_FOLDER = "base"  # in an export: the embedded base model
HUB_ID = r"[\w.-]+/[\w.-]+"
# The values that vLLM's --max-lora-rank takes and every version knows; an adapter's rank may be any up to it.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def portable(path: str) -> str:
    """A model's or prompt set's path as others can read it: names and hub ids stay, a folder is only named.

    A folder in the hub's download cache becomes the hub id that it was downloaded by.
    """
    if match := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path):
        return f"{match[1]}/{match[2]}"
    if not path:
        return ""
    here = Path(path).expanduser()
    return here.resolve().name if path.startswith(("/", ".", "~")) or here.exists() else path


def base_name(state: CheckpointState) -> str:
    """What an export calls its base model: ``base`` inside it (the embedded one), a hub id, or a folder's name."""
    if state.base_model == "tiny":
        return BASE_FOLDER
    inside = state.base_source != state.base_model and "/snapshots/" not in state.base_source
    return Path(state.base_source).name if inside else portable(state.base_source)


def card(state: CheckpointState, config: RunConfig, format: Format, summary: Mapping[str, Any] | None) -> str:
    """The model card: the hub's YAML header, what it is, what it gains, how it was trained, how to use it.

    Args:
        config: the run's settings, with paths made portable.
    """
    base = base_name(state)
    header = [
        "library_name: " + ("peft" if format == "peft" else "transformers"),
        "pipeline_tag: text-generation",
        "tags: [grpo, prompt-rewriting]",
    ]
    if re.fullmatch(HUB_ID, base):  # the hub accepts only its own ids here
        header.insert(0, f"base_model: {base}")
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _settings(state, config, base).items())
    return f"""---
{chr(10).join(header)}
---

# Prompt rewriter

Rewrites a text-to-image prompt so that the picture matches the prompt better. Trained with GRPO: groups of
rewrites of each prompt were rendered, and their pictures scored against the original prompt.

## Measured gain

{_gains(summary)}

## Training

| | |
|---|---|
{table}

All settings are in `config.yaml`, the last step's numbers in `metrics.json`.

## Use

In front of any diffusers `pipeline`, run in this folder:

```python
{_loading(config, format, state.kind, base)}

{_rewriting(config)}

image = pipeline(rewrite("a red cube on a green table")).images[0]
```
{_serving(config, format, base)}"""


def _settings(state: CheckpointState, config: RunConfig, base: str) -> dict[str, str]:
    models, training, sampling, objective = config.models, config.training, config.sampling, config.objective
    low, high = objective.clips
    return {
        "Base model": "the small policy that ships with the program" if state.base_model == "tiny" else base,
        "Trained weights": f"LoRA, rank {models.policy.lora.rank}, alpha {models.policy.lora.alpha:g}"
        if state.kind == "lora"
        else "all of the language model",
        "Request": models.policy.template,
        **({"System message": models.policy.system} if models.policy.system else {}),
        "Prompts": f"{config.data.prompts} ({', '.join(config.data.tiers)})",
        "Image model": f"{models.image.path}, {models.image.resolution} px, {models.image.steps} steps, "
        f"guidance {models.image.guidance:g}",
        "Reward": f"{models.reward.path} {models.reward.pretrained}".strip(),
        "Steps": f"{state.step} of {training.steps}, each {training.batch_size} prompts x "
        f"{sampling.num_rollouts} rollouts",
        "Sampling": f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p "
        f"{sampling.top_p:g}, at most {sampling.max_new_tokens} tokens",
        "Objective": f"{objective.kind}, clip {low:g} / {high:g}, KL {objective.kl_coef:g}, "
        f"entropy {objective.entropy_coef:g}",
        "Optimizer": f"AdamW, learning rate {training.learning_rate:g}, {training.schedule}",
        "Seed": str(config.seed),
        "Libraries": ", ".join(f"{name} {version}" for name, version in state.versions.items()),
    }


def _cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table, and is no markup."""
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(sign, shown)
    return text


def _gains(summary: Mapping[str, Any] | None) -> str:
    """What the evaluation found, with every interval."""
    if not summary or not summary.get("gains"):
        return "No gain was measured for this export."
    rows = [
        f"| {name.replace('_', ' ')} | {gain['mean']:+.2f} | {gain['low']:+.2f} to {gain['high']:+.2f} "
        f"| {gain['n']} | {gain['win_rate']:.0%} |"
        for name, gain in summary["gains"].items()
    ]
    table = "\n".join(rows)
    return f"""{summary["sentence"]}

Paired gains in reward on held-out prompts, on latents that the compared rewrites share:

| Comparison | Gain | {summary["confidence"]:.0%} interval | Prompts | Prompts that gained |
|---|---|---|---|---|
{table}"""


def _loading(config: RunConfig, format: Format, kind: str, base: str) -> str:
    """Python that binds ``policy``, on its device, and ``tokenizer``."""
    dtype = repr(config.models.policy.dtype)
    imports = ["import torch"]
    if format == "peft":
        imports.append("from peft import PeftModel")
    elif format == "pth" and kind == "lora":
        imports.append("from peft import PeftConfig, get_peft_model, set_peft_model_state_dict")
    imports.append("from transformers import AutoModelForImageTextToText, AutoTokenizer")
    if format == "merged":
        lines = ['base = "."  # this folder']
    elif re.fullmatch(HUB_ID, base):
        lines = [f"base = {base!r}"]
    elif base == BASE_FOLDER:
        lines = [f"base = {base!r}  # in this folder"]
    else:
        lines = [f"base = {base!r}  # put the folder or hub id of this base model here"]
    lines.append(f"policy = AutoModelForImageTextToText.from_pretrained(base, dtype={dtype})")
    if format == "peft":
        lines.append('policy = PeftModel.from_pretrained(policy, ".")')
    elif format == "pth":
        lines.append(f'saved = torch.load("{PTH_FILE}", weights_only=True)')
        if kind == "lora":
            lines += [
                'adapter = PeftConfig.from_peft_type(**saved["metadata"]["adapter"])',
                "policy = get_peft_model(policy, adapter)",
                'set_peft_model_state_dict(policy, saved["weights"])',
            ]
        else:
            lines.append('policy.load_state_dict(saved["weights"], strict=False)')
    lines += [
        'policy = policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
    ]
    return "\n".join([*imports, "", *lines])


def _rewriting(config: RunConfig) -> str:
    """Python that binds ``rewrite``: the likeliest rewrite of a prompt, read as in training."""
    system = config.models.policy.system
    head = f'{{"role": "system", "content": [{{"type": "text", "text": {system!r}}}]}}, ' if system else ""
    return f"""
def rewrite(prompt):
    request = {config.models.policy.template!r}.replace("{{prompt}}", prompt)
    messages = [{head}{{"role": "user", "content": [{{"type": "text", "text": request}}]}}]
    chat = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = tokenizer.apply_chat_template(messages, **chat).to(policy.device)
    chosen = dict(max_new_tokens={config.sampling.max_new_tokens}, do_sample=False, repetition_penalty=1.0)
    output = policy.generate(**tokens, **chosen)[0, tokens["input_ids"].shape[1]:]
    lines = tokenizer.decode(output, skip_special_tokens=True).splitlines()
    lines = [" ".join(line.split()).strip({QUOTES + " "!r}) for line in lines]
    return next((line for line in lines if any(map(str.isalnum, line))), prompt)
"""


def _serving(config: RunConfig, format: Format, base: str) -> str:
    if format != "peft":
        return ""
    rank = next(rank for rank in VLLM_RANKS if rank >= config.models.policy.lora.rank)
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules rewriter=."
    return (
        f"\nvLLM serves it beside the base, as the model `rewriter`: `vllm serve {shlex.quote(base)} {options}`. It is "
        "to be asked with the request above around the prompt.\n"
    )
