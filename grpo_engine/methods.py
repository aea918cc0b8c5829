"""Published variants of the objective by name, as the parts that make them up; all other settings stay as they are.

A method is no setting of its own: its name stands for settings of ``objective``, which may be changed one by one after
it. So a run's settings say what it did, whatever name it was started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_GRPO: dict[str, Any] = {
    "kind": "grpo", "scale": "group", "baseline": "mean", "aggregation": "sequence", "clip_low": None,
    "clip_high": None, "dynamic_sampling": 0,
}  # fmt: skip

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": _GRPO,  # arXiv 2402.03300
        # arXiv 2503.14476: clip-higher, the mean over all tokens, groups with spread only, no KL penalty. Its penalty
        # for overlong answers is a part of the reward: models.reward.weights.length.
        "dapo": _GRPO | {"aggregation": "token", "clip_high": 0.28, "dynamic_sampling": 2, "kl_coef": 0.0},
        "dr_grpo": _GRPO | {"scale": "none", "aggregation": "constant"},  # arXiv 2503.20783
        "rloo": _GRPO | {"scale": "none", "baseline": "leave_one_out"},  # arXiv 2402.14740
        # arXiv 2507.18071, with the clipping of its experiments
        "gspo": _GRPO | {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        "cispo": _GRPO | {"kind": "cispo", "aggregation": "token"},  # arXiv 2506.13585
    }
)
"""Name -> settings of ``objective``. The mathematics, with equations, is in ``objective.py``."""
