"""A policy of 4 bits: its language model packed, everything else as it was, and it trains.

Needs bitsandbytes (``pip install -e .[quantize]``). Uses the GPU where there is one; the program asks for one, but
the library computes on a CPU too, and that is enough to see what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import RankScorer, fresh_environment, small, trainer
from model_folders import LAYERS, write_policy
from torch import nn

from grpo_engine import loading
from grpo_engine.memory_needs import NF4
from grpo_engine.model_sizes import policy_size
from grpo_engine.policy import PureGRPOPolicy

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_policy(tmp_path / "policy", "qwen2_5_vl")


def test_the_language_model_is_packed_and_nothing_else_and_it_trains(
    folder: Path, base_of: Callable[[PureGRPOPolicy], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(loading, "_check_quantized", lambda device: None)
        # Else evaluation packs the weights in a format that training can't use. No GPU has that format.
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    config = small(
        f"models.policy.path={folder}", "models.policy.quantize=4bit", "models.policy.gradient_checkpointing=true",
        f"placement.policy={device}", "training.learning_rate=1e-2", "training.steps=2", "sampling.max_new_tokens=6",
    )  # fmt: skip
    trained, recorder = trainer(config, loaded=fresh_environment(config, RankScorer()))
    policy = trained.policy
    packed = {
        name: module
        for name, module in base_of(policy).named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert len(packed) == len(policy.adapted_layers) == 7 * LAYERS
    assert all("language_model.layers" in name for name in packed)
    whole = [name for name, m in base_of(policy).named_modules() if type(m) is nn.Linear and "lora" not in name]
    assert "lm_head" in whole and any("visual" in name for name in whole)
    assert {module.weight.quant_state.quant_type for module in packed.values()} == {"nf4"}
    assert {module.compute_dtype for module in packed.values()} == {torch.bfloat16}
    size = policy_size(str(folder))
    assert sum(module.weight.quant_state.shape.numel() for module in packed.values()) == size.packable
    stored = sum(module.weight.numel() * module.weight.element_size() for module in packed.values())
    assert stored == size.packable // 2 < size.packable * NF4

    before = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    trained.train()
    assert all(metrics["skipped"] == 0.0 and (metrics["grad_norm"] or 0.0) > 0.0 for metrics in recorder.metrics)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in policy.trainable().items())
    (answer,) = policy.probability_of_yes([np.zeros((64, 64, 3), dtype=np.uint8)], ["a red circle"])
    assert 0.0 < answer < 1.0
