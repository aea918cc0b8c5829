"""The embedded models: a small rendered world, and a policy, an image model and a reward trained on it."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
