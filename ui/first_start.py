"""What an empty database is given, so that every screen has something real on it from the first second."""

from __future__ import annotations

import logging
from pathlib import Path

from grpo_engine.bundle import BundleError, read_bundle
from grpo_engine.store import Store

log = logging.getLogger(__name__)

EXAMPLE = Path(__file__).resolve().parent.parent / "configs" / "example-run.zip"


def first_start(store: Store) -> None:
    """Import the recorded example run into a database that never held a run; once removed, it stays away."""
    if store.ever_used() or not EXAMPLE.is_file():
        return
    try:
        read_bundle(store, EXAMPLE)
    except BundleError:
        log.exception("the example run could not be imported")  # the app works without it
