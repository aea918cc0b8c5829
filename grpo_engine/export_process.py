"""An export in a process of its own, for a program that trains in this one.

Loading a model sets torch's default number format for a while, for all threads: a step computed meanwhile in the
same process would not be the same step.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from .checkpoint_folder import CheckpointError
from .config import ConfigError, RunConfig
from .model_card import Format


def export_apart(
    run_folder: Path,
    to: Path,
    *,
    format: Format,
    config: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    which: Literal["last", "best"],
) -> None:
    """`export.export` in a new process, which loads the base model for ``merged`` on the CPU.

    Raises:
        CheckpointError, ConfigError: what the export was refused for, or that its process died.
        RuntimeError: anything else that went wrong there.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and locks
    here, there = context.Pipe(duplex=False)
    asked = (run_folder, to, format, dict(config), summary, which)
    process = context.Process(target=_serve, args=(there, *asked), name="grpo-export", daemon=True)
    process.start()
    there.close()
    try:
        error: Exception | None = here.recv()
    except EOFError:
        process.join()
        raise CheckpointError(
            f"The export's process died (exit code {process.exitcode}), perhaps for lack of memory; try again when "
            "there is more."
        ) from None
    process.join()
    if error is not None:
        raise error


def _serve(
    line: Connection,
    run_folder: Path,
    to: Path,
    format: Format,
    config: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    which: Literal["last", "best"],
) -> None:
    """Export, and say what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the app, which then ends this process
    try:
        from .export import export

        policy = None
        if format == "merged":
            import torch

            from .loading import load_policy

            policy = load_policy(RunConfig.parse(config), torch.device("cpu"))
        export(run_folder, to, format=format, policy=policy, summary=summary, which=which)
        line.send(None)
    except (CheckpointError, ConfigError) as error:
        line.send(error)
    except Exception as error:  # a bug, or a library's: its class may not survive the way to the other process
        line.send(RuntimeError(f"{type(error).__name__}: {error}"))
