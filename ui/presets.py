"""Presets: those in ``configs/`` that come with the program, and saved ones in ``presets/`` beside the database."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import yaml

from grpo_engine.config import PRESETS, ConfigError, RunConfig, preset_names

from .context import Refused

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
NAME_RULE = "use up to 40 lower-case letters, digits, - and _, the first a letter or a digit"


class Presets:
    """Named settings to start from.

    A saved preset is a YAML file of the same form as a shipped one: it holds only what differs from the defaults,
    and ``--config`` takes its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def saved(self) -> list[str]:
        """Names of the saved presets. A shipped preset's name always means the shipped one."""
        names = (path.stem for path in self.folder.glob("*.yaml"))
        return sorted(name for name in names if NAME.fullmatch(name) and name not in preset_names())

    def path(self, name: str) -> Path:
        """The YAML file of a preset. Only names are taken, never paths. Raises `Refused`."""
        if name in preset_names():
            return PRESETS / f"{name}.yaml"
        if name in self.saved():
            return self.folder / f"{name}.yaml"
        raise Refused(f"There is no preset {name!r}; choose another.", field="preset", status=404)

    def load(self, name: str) -> RunConfig:
        """A preset's settings. Raises `Refused` for an unknown name, `ConfigError` for a broken file."""
        return RunConfig.load(self.path(name))

    def listed(self) -> list[tuple[str, bool, RunConfig | None, str]]:
        """(name, saved?, settings, what is wrong with it) of every preset, the default first."""
        found: list[tuple[str, bool, RunConfig | None, str]] = []
        for name, saved in [*((name, False) for name in preset_names()), *((name, True) for name in self.saved())]:
            try:
                found.append((name, saved, self.load(name), ""))
            except ConfigError as error:  # edited by hand
                found.append((name, saved, None, str(error)))
        return found

    def save(self, name: str, config: RunConfig, *, overwrite: bool) -> None:
        """Write what differs from the defaults, except the run's name. Raises `Refused`."""
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} can't be a preset's name: {NAME_RULE}.", field="name", status=422)
        if name in preset_names():
            raise Refused(f"{name!r} comes with the program and stays as it is; choose another name.", field="name")
        path = self.folder / f"{name}.yaml"
        if path.exists() and not overwrite:
            raise Refused(f"There is a preset {name!r} already.", field="overwrite")
        changed = {key: mine for key, (mine, _) in config.differences(RunConfig()).items()}
        for key in ("preset", "recording.name"):
            changed.pop(key, None)
        text = yaml.safe_dump(_nested(changed), sort_keys=False, allow_unicode=True) if changed else ""
        temporary = path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(f"# Saved from the app. What is not here has its default value.\n{text}", "utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise Refused(f"The preset can't be written to {self.folder}: {error.strerror}.") from error


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested sections."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        *parents, leaf = name.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out
