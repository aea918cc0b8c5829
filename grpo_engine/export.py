"""Taking a trained rewriter away: as a peft adapter, a merged model, or one ``.pth`` file, with a model card.

The weights come from a verified checkpoint, never from the policy at hand, which only lends its base model
and is not changed. The target folder appears whole, by a rename.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from .checkpoint import (
    WEIGHT_FILES,
    CheckpointError,
    CheckpointState,
    SavedPolicy,
    find_checkpoint,
    matched_weights,
    read_weights,
    verify_checkpoint,
)
from .checkpoint_folder import STATE_FILE, publish, writing
from .config import RunConfig

Format = Literal["peft", "merged", "pth"]

FORMAT = "pure-grpo-export"
VERSION = 1
PTH_FILE = "pure_grpo_policy.pth"
METRICS_FILE = "metrics.json"


class ExportError(CheckpointError):
    """An export that was refused; the message is one plain sentence."""


def export(
    run_folder_or_checkpoint: Path | str,
    to: Path | str,
    *,
    format: Format = "peft",
    policy: SavedPolicy | None = None,
    summary: Mapping[str, Any] | None = None,
    force: bool = False,
    which: Literal["last", "best"] | int = "last",
) -> Path:
    """Write the trained policy to the folder ``to``; returns its absolute path.

    Args:
        format: ``peft``: an adapter for ``PeftModel.from_pretrained``. ``merged``: a whole model and its
            processor for the Auto classes. ``pth``: ``pure_grpo_policy.pth``, plain tensors and plain data.
        policy: needed for ``merged``: the base model is copied from it to the CPU.
        summary: the final evaluation's, as ``evaluation.summarise`` makes it, for the model card.
        force: replace an earlier export in ``to``. Any other folder that isn't empty is refused all the same.
        which: the checkpoint, when a run's folder is given.

    Raises:
        CheckpointError: no usable checkpoint, or the disk refused.
        ExportError: the target is taken, or the format does not fit the policy.
    """
    target = Path(to).expanduser().resolve()
    with writing(f"The export {target}"):
        _tidy(target)
    _check_target(target, force)
    state = _source(Path(run_folder_or_checkpoint), which)
    _check_format(state, format, policy)
    config = RunConfig.load(state.path / "config.yaml")
    summary = json.loads(json.dumps(summary))
    partial = target.parent / f".partial-{target.name}-{os.getpid()}"
    try:
        with writing(f"The export {target}"):
            partial.mkdir(parents=True)
            if format == "peft":
                for name in (WEIGHT_FILES["lora"], "adapter_config.json"):
                    shutil.copyfile(state.path / name, partial / name)
            elif format == "pth":
                _write_pth(partial / PTH_FILE, state, config, summary)
            elif policy is not None:
                _write_merged(partial, state, policy)
            shutil.copyfile(state.path / "config.yaml", partial / "config.yaml")
            numbers = _header(state, format) | {"metrics": state.metrics, "evaluation": summary}
            (partial / METRICS_FILE).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(_card(state, config, format, summary), encoding="utf-8")
            publish(partial, target)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _source(path: Path, which: Literal["last", "best"] | int) -> CheckpointState:
    if (path / STATE_FILE).is_file():
        return verify_checkpoint(path)
    found = find_checkpoint(path, which)
    if found.note:
        logging.getLogger(__name__).warning(found.note)
    return verify_checkpoint(found.path)


def _check_target(target: Path, force: bool) -> None:
    """Only an empty place, or with ``force`` an earlier export, is written to: nothing else is deleted."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not _is_export(target):
        raise ExportError(f"{target} is not empty and not an export of this program; give a new or empty folder.")
    if not force:
        raise ExportError(f"{target} already holds an export; give another folder, or --force to replace it.")


def _is_export(folder: Path) -> bool:
    try:
        data = json.loads((folder / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _check_format(state: CheckpointState, format: Format, policy: SavedPolicy | None) -> None:
    if format == "peft" and state.kind != "lora":
        raise ExportError("All weights were trained, so there is no adapter to export; use the format merged or pth.")
    if format == "merged":
        if policy is None:
            raise ExportError("The format merged needs the policy's base model; load it first, or use peft or pth.")
        model = policy.model.get_base_model() if isinstance(policy.model, PeftModel) else policy.model
        if getattr(model, "hf_quantizer", None) is not None:
            raise ExportError("A quantized base model can't be merged without loss; load it in bfloat16, or use peft.")


def _tidy(target: Path) -> None:
    """Undo what a killed export to the same target left behind."""
    for path in sorted(target.parent.glob(".*")):
        match = re.fullmatch(r"\.(partial|replaced)-(.*)-\d+", path.name)
        if match and match.group(2) == target.name:
            if match.group(1) == "replaced" and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path)


def _header(state: CheckpointState, format: Format) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": format,
        "step": state.step,
        "base_model": state.base_model,
        "versions": state.versions,
    }


def _write_pth(file: Path, state: CheckpointState, config: RunConfig, summary: Mapping[str, Any] | None) -> None:
    adapter = None
    if state.kind == "lora":
        adapter = json.loads((state.path / "adapter_config.json").read_text(encoding="utf-8"))
    metadata = _header(state, "pth") | {
        "adapter": adapter,
        "config": config.model_dump(mode="json"),
        "metrics": state.metrics,
        "evaluation": summary,
    }
    weights = {name: tensor.clone() for name, tensor in read_weights(state).items()}
    torch.save({"metadata": metadata, "weights": weights}, file)


def _write_merged(folder: Path, state: CheckpointState, policy: SavedPolicy) -> None:
    pairs = matched_weights(state, policy)
    # The copy's tensors are made on the CPU first and handed to deepcopy as already copied, so that the
    # model's structure is duplicated and the accelerator's memory is not.
    copies: dict[int, Any] = {}
    for parameter in policy.model.parameters():
        data = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = torch.nn.Parameter(data, requires_grad=False)
    for buffer in policy.model.buffers():
        copies[id(buffer)] = buffer.detach().to("cpu", copy=True)
    model = copy.deepcopy(policy.model, copies)
    with torch.no_grad():
        for parameter, saved in pairs:
            copies[id(parameter)].copy_(saved)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(str(folder))
    policy.processor.save_pretrained(str(folder))


def _card(state: CheckpointState, config: RunConfig, format: Format, summary: Mapping[str, Any] | None) -> str:
    """The model card: the hub's YAML header, what it is, what it gains, how it was trained, how to use it."""
    models, training, sampling, objective = config.models, config.training, config.sampling, config.objective
    header = [
        "library_name: " + ("peft" if format == "peft" else "transformers"),
        "tags: [grpo, prompt-rewriting]",
    ]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", state.base_source):  # the hub accepts only its own ids here
        header.insert(0, f"base_model: {state.base_source}")
    low, high = objective.clips
    settings = {
        "Base model": state.base_source,
        "Trained weights": f"LoRA, rank {models.policy.lora.rank}, alpha {models.policy.lora.alpha:g}"
        if state.kind == "lora"
        else "all of the language model",
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
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
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

In front of any diffusers `pipeline`:

```python
{_loading(state, format)}
{_rewriting(config)}
```
{_serving(config, format)}"""


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


def _loading(state: CheckpointState, format: Format) -> str:
    """Python that binds ``policy`` and ``tokenizer``."""
    base = f'base = "{state.base_source}"\nfolder = "."  # this folder'
    imports = "from transformers import AutoModelForImageTextToText, AutoTokenizer\n"
    if format == "merged":
        return f"""{imports}
folder = "."  # this folder
policy = AutoModelForImageTextToText.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
    start = f"{base}\npolicy = AutoModelForImageTextToText.from_pretrained(base)\n"
    end = "tokenizer = AutoTokenizer.from_pretrained(base)\n"
    if format == "peft":
        start += "policy = PeftModel.from_pretrained(policy, folder)\n"
        return f"from peft import PeftModel\n{imports}\n{start}{end}"
    start += f'saved = torch.load(f"{{folder}}/{PTH_FILE}", weights_only=True)\n'
    if state.kind == "full":
        return f'import torch\n{imports}\n{start}policy.load_state_dict(saved["weights"], strict=False)\n{end}'
    start += 'adapter = PeftConfig.from_peft_type(**saved["metadata"]["adapter"])\n'
    start += 'policy = get_peft_model(policy, adapter)\nset_peft_model_state_dict(policy, saved["weights"])\n'
    names = "from peft import PeftConfig, get_peft_model, set_peft_model_state_dict\n"
    return f"import torch\n{names}{imports}\n{start}{end}"


def _rewriting(config: RunConfig) -> str:
    """Python that turns a prompt into a rewrite and the rewrite into a picture."""
    system = config.models.policy.system
    head = f'{{"role": "system", "content": [{{"type": "text", "text": {system!r}}}]}}, ' if system else ""
    return f"""prompt = "a red cube on a green table"
request = {config.models.policy.template!r}.replace("{{prompt}}", prompt)
messages = [{head}{{"role": "user", "content": [{{"type": "text", "text": request}}]}}]
chat = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")

tokens = tokenizer.apply_chat_template(messages, **chat)
output = policy.generate(**tokens, max_new_tokens={config.sampling.max_new_tokens}, do_sample=False)
rewrite = tokenizer.decode(output[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True)
image = pipeline(rewrite.strip().split("\\n")[0].strip("\\"' ")).images[0]"""


def _serving(config: RunConfig, format: Format) -> str:
    if format != "peft":
        return ""
    rank = config.models.policy.lora.rank
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules rewriter=."
    return f"\nvLLM serves it beside the base with `{options}`.\n"
