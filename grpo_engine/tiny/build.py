"""Retrain the embedded models from nothing: ``python -m grpo_engine.tiny.build``.

Stages: pictures, tokenizers, autoencoder, latents, CLIP, denoiser, policy, assembly, measurement. Each is
resumable; a stage that is done is not done again unless ``--fresh``. Everything follows from one seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import WEIGHTS
from .autoencoder import RECIPE as AUTOENCODER_RECIPE
from .autoencoder import new_autoencoder, normalise_latents, reconstruction_psnr, train_autoencoder
from .card import model_card
from .clip import RECIPE as CLIP_RECIPE
from .clip import new_clip, save_clip, train_clip
from .comparing import Comparison
from .corpus import Pool, build_pool
from .diffusion import RECIPE as DENOISER_RECIPE
from .diffusion import Denoiser, cached_latents, pipeline, train_denoiser
from .eyes import RECIPE as EYES_RECIPE
from .eyes import eyes_of
from .fitting import progress_bar
from .sft import JUDGE as POLICY_JUDGE_RECIPE
from .sft import LAST as POLICY_LAST_RECIPE
from .sft import RECIPE as POLICY_RECIPE
from .sft import new_policy, new_processor, train_policy
from .vocabulary import CLIP_CONTEXT, save_tokenizers

BUILD = Path(__file__).resolve().parent / ".build"
POOL_SIZE, HELD_OUT_SIZE = 40_000, 2_000
STAGES = ("autoencoder", "clip", "denoiser", "policy")


class TextIds:
    """The CLIP tokenizer as open_clip calls it: texts to int64 (N, context)."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(
            texts, return_tensors="pt", max_length=self.context, padding="max_length", truncation=True
        ).input_ids


class Build:
    """The stages, in order, on one folder."""

    def __init__(self, folder: Path, seed: int, device: torch.device, *, compiled: bool) -> None:
        from transformers import AutoTokenizer

        self.folder, self.seed, self.device, self.compiled = folder, seed, device, compiled
        folder.mkdir(parents=True, exist_ok=True)
        note, same = folder / "build.json", {"seed": seed, "pictures": [POOL_SIZE, HELD_OUT_SIZE]}
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != same:
            raise SystemExit(f"{folder} holds work begun with other settings; use --fresh, or another --folder.")
        note.write_text(json.dumps(same), encoding="utf-8")
        self._log_file = (folder / "build.log").open("a", encoding="utf-8")
        clip, qwen = save_tokenizers(folder, seed)
        self.clip_folder = clip
        self.clip_tokenizer: Any = AutoTokenizer.from_pretrained(clip)
        self.qwen_tokenizer: Any = AutoTokenizer.from_pretrained(qwen)

    def log(self, line: str) -> None:
        """One line into ``build.log``."""
        self._log_file.write(line + "\n")
        self._log_file.flush()

    def pool(self, name: str) -> Pool:
        """The training pool or the held-out one."""
        size = POOL_SIZE if name == "train" else HELD_OUT_SIZE
        with progress_bar(f"pictures ({name})", size) as update:
            report: Callable[[int, int], None] = lambda done, total: update(done, "")  # noqa: E731
            return build_pool(self.folder, name, size, self.seed, held_out=name == "held_out", report=report)

    def autoencoder(self) -> Any:
        """Trained, with its latent statistics."""
        return train_autoencoder(
            self.pool("train"), self.folder, self.seed, self.device, self.log, compiled=self.compiled
        )

    def clip(self) -> Any:
        """Trained open_clip model."""
        tokenizer = TextIds(self.clip_tokenizer, CLIP_CONTEXT + 8)
        return train_clip(
            self.pool("train"), tokenizer, len(self.clip_tokenizer), self.folder, self.seed, self.device, self.log,
            compiled=self.compiled,
        )  # fmt: skip

    def denoiser(self, autoencoder: Any) -> Denoiser:
        """Trained text encoders and transformer."""
        pool = self.pool("train")
        latents = cached_latents(pool, autoencoder, self.folder, self.device)
        return train_denoiser(
            pool,
            latents,
            self.clip_tokenizer,
            self.folder,
            self.seed,
            self.device,
            self.log,
            compiled=self.compiled,
        )

    def policy(self) -> Any:
        """Trained rewriter."""
        return train_policy(self.pool("train"), self.qwen_tokenizer, self.folder, self.seed, self.device, self.log)

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """Train ``stages`` and write their folders under the package's weights."""
        if "autoencoder" in stages or "denoiser" in stages:
            autoencoder = self.autoencoder()
            self.log(f"reconstruction {reconstruction_psnr(autoencoder, self.pool('held_out'), self.device):.2f} dB")
            if "denoiser" in stages:
                save_image_model(self.denoiser(autoencoder), autoencoder, self.clip_tokenizer, WEIGHTS / "image")
        if "clip" in stages:
            model = self.clip().to("cpu")
            save_clip(model, self.clip_folder, len(self.clip_tokenizer), WEIGHTS / "reward", torch.float16)
        if "policy" in stages:
            save_policy(self.policy(), self.qwen_tokenizer, WEIGHTS / "policy")

    def assemble(self) -> None:
        """Write the weights as they stand in the build folder, finished, unfinished or not begun."""
        autoencoder, denoiser = new_autoencoder(), Denoiser(self.clip_tokenizer)
        clip, policy = new_clip(len(self.clip_tokenizer)), new_policy(self.qwen_tokenizer)
        models = {"autoencoder": autoencoder, "denoiser": denoiser, "clip": clip, "policy": policy}
        steps = {name: _load_average(self.folder, name, model) for name, model in models.items()}
        # Lessons that take the place of the one before, once begun.
        steps["policy-eyes"] = _load_average(self.folder, "policy-eyes", eyes_of(policy))
        steps["policy-last"] = _load_average(self.folder, "policy-last", policy)
        steps["policy-judge"] = _load_average(self.folder, "policy-judge", Comparison(policy))
        normalise_latents(autoencoder, self.pool("train"), self.device)
        save_image_model(denoiser, autoencoder, self.clip_tokenizer, WEIGHTS / "image")
        save_clip(clip, self.clip_folder, len(self.clip_tokenizer), WEIGHTS / "reward", torch.float16)
        save_policy(policy, self.qwen_tokenizer, WEIGHTS / "policy")
        print("assembled at steps", steps)


def _load_average(folder: Path, name: str, model: torch.nn.Module) -> int:
    """Put the averaged weights of an unfinished stage into ``model``; returns its step (0 = not begun)."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for param, value in zip((p for p in model.parameters() if p.requires_grad), state["average"], strict=True):
            param.copy_(value)
    model.eval()
    return int(state["step"])


def save_image_model(model: Denoiser, autoencoder: Any, tokenizer: Any, folder: Path) -> None:
    """Write the pipeline in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe: Any = pipeline(model.to("cpu"), autoencoder.to("cpu"), tokenizer)
    pipe.to(torch.float16).save_pretrained(folder)


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and processor in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to("cpu").to(torch.float16).save_pretrained(folder)
    new_processor(tokenizer).save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m grpo_engine.tiny.build", description=__doc__)
    parser.add_argument("--folder", type=Path, default=BUILD, help="where unfinished work is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = as many as cores")
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler")
    parser.add_argument("--fresh", action="store_true", help="forget unfinished and finished stages first")
    parser.add_argument("--assemble", action="store_true", help="only write the weights as they stand")
    parser.add_argument("--measure", action="store_true", help="only measure the written weights")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.fresh:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    from .measure import measure

    if not arguments.measure:
        begun = time.monotonic()
        device = torch.device(arguments.device)
        build = Build(arguments.folder, arguments.seed, device, compiled=not arguments.no_compile)
        if arguments.assemble:
            build.assemble()
        else:
            build.run(tuple(arguments.stages))
            print(f"trained in {(time.monotonic() - begun) / 60:.0f} minutes")
    metrics = measure()
    recipes = {
        "autoencoder": vars(AUTOENCODER_RECIPE),
        "clip": vars(CLIP_RECIPE),
        "denoiser": vars(DENOISER_RECIPE),
        "policy": vars(POLICY_RECIPE),
        "policy-eyes": vars(EYES_RECIPE),
        "policy-last": vars(POLICY_LAST_RECIPE),
        "policy-judge": vars(POLICY_JUDGE_RECIPE),
    }
    report = {"metrics": metrics, "recipes": recipes, "seed": arguments.seed, "torch": torch.__version__}
    (WEIGHTS / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (WEIGHTS / "MODEL_CARD.md").write_text(model_card(report), encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
