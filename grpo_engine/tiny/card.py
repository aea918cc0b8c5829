"""The model card of the embedded models, written from their measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """# Embedded models

Small models of the published classes, trained from nothing on a rendered world for this program: the default of
`python -m grpo_engine train`. They are no use for anything else. Licence: Apache-2.0, like the program.

| part | class | parameters | reads | gives |
|---|---|---|---|---|
| policy | `Qwen2VLForConditionalGeneration` | 2.3 M | a prompt; or a picture and a question | a rewrite; Yes or No |
| image model | `StableDiffusion3Pipeline` (MMDiT, two CLIP text encoders, no T5, `AutoencoderKL`) | 9.9 M | a caption | a 96 x 96 picture |
| reward | `open_clip` CLIP | 2.0 M | a picture and a text | their similarity |

**Data.** Scenes of one or two objects (8 shapes, 10 colours, 2 sizes, 3 textures) on 5 backgrounds, drawn by
`world.py`; sentences by `captions.py`. A tenth of all scenes, chosen by a hash, is in no training data of any model;
everything below is measured on that tenth.

**Recipe.** `python -m grpo_engine.tiny.build` (seed {seed}, PyTorch {torch}) retrains everything. Steps and batch:
{recipes}.
The image model saw canonical captions only. The reward saw captions and paraphrases, in batches with one-attribute
changes as negatives. The policy learned to translate paraphrases to captions, then to do so carelessly: right captions
are a minority of what it writes, which is what GRPO then changes. Its vision tower had a lesson of its own (every
picture token names the object it covers), and so had its judgement (word by word); without them it told colours apart
and nothing else. A changed shape or place still escapes it more often than not.

**Measured** (`python -m grpo_engine.tiny.build --measure`):

"""

LINES = (
    ("checker, all attributes right on drawn scenes", "checker", "all_right", "%"),
    ("autoencoder, PSNR", "autoencoder", "psnr_db", "dB"),
    ("reward, right caption among 100, captions", "clip", "right_among_100_captions", "%"),
    ("reward, right caption among 100, paraphrases", "clip", "right_among_100_paraphrases", "%"),
    ("image model, names right (count, shapes, colours), one object, caption", "image_model", "single_caption_names_right", "%"),
    ("image model, names right, two objects, caption", "image_model", "pair_caption_names_right", "%"),
    ("image model, names right, one object, raw paraphrase", "image_model", "single_paraphrase_names_right", "%"),
    ("image model, names right, two objects, raw paraphrase", "image_model", "pair_paraphrase_names_right", "%"),
    ("policy, different rewrites among 8 samples", "policy", "distinct_of_8", ""),
    ("policy, right captions among its samples", "policy", "right_share", "%"),
    ("policy, right captions, greedy", "policy", "greedy_right_share", "%"),
    ("policy, yes/no answers right, balanced", "policy", "yes_no_accuracy", "%"),
    *(
        (f"policy, a single changed {kind} noticed", "policy", f"noticed_{kind}", "%")
        for kind in ("shape", "color", "size", "texture", "place", "background")
    ),
    ("32 pictures", "speed", "seconds_32_pictures", "s"),
    ("32 rewrites", "speed", "seconds_32_rewrites", "s"),
    ("loading all three models after imports", "speed", "seconds_loading", "s"),
)  # fmt: skip


def model_card(report: Mapping[str, Any]) -> str:
    """Markdown text from the report that ``metrics.json`` holds."""
    recipes = "; ".join(f"{name} {r['steps']} x {r['batch']}" for name, r in report["recipes"].items())
    rows = ["| what | measured |", "|---|---|"]
    for label, part, name, unit in LINES:
        value = report["metrics"][part][name]
        shown = f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f} {unit}".strip()
        rows.append(f"| {label} | {shown} |")
    note = f"\nSpeeds with {report['metrics']['speed']['threads']} CPU threads.\n"
    return HEAD.format(seed=report["seed"], torch=report["torch"], recipes=recipes) + "\n".join(rows) + "\n" + note
