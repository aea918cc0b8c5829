"""Models from the hub: what a run still has to download, whether that can work, and the download itself.

Everything that can go wrong on the way becomes one plain sentence, before any model loads. What is complete in
the hub's cache is never asked for over the network. Whole files are kept when a download breaks off, so the next
start goes on from there; the file that was being written begins anew.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tqdm.std import tqdm

from . import model_files
from .config import ConfigError, ImageModelConfig, RunConfig

Told = Callable[[str, int, int], None]
Kind = Literal["policy", "image", "reward", "tokenizer", "file"]

PROBES: dict[Kind, str] = {
    "policy": "config.json",
    "image": "model_index.json",
    "reward": "open_clip_config.json",
    "tokenizer": "tokenizer_config.json",
}
"""The file without which a repository holds no model of that kind."""

TIMEOUT = 10.0  # seconds that the hub may take to answer
REMEMBERED = 120.0  # seconds that an answer stands: a run is checked several times before it starts
MB = 10**6
GB = 10**9
# Of the HTTP library that the installed version of the hub's client uses; its connection errors are of this class.
TransportError: type[Exception] = HfHubHTTPError.__bases__[0]


class HubError(ConfigError):
    """A model can't be fetched; one sentence with the way out."""


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that a run reads.

    Attributes:
        setting: the setting that names it.
        file: the only file that is wanted; empty = all that a model of this kind needs.
        instead: names under which that file may be stored otherwise.
        image: of an image model; they say which parts of it are not loaded.
    """

    setting: str
    name: str
    kind: Kind
    file: str = ""
    instead: tuple[str, ...] = ()
    image: ImageModelConfig | None = None

    @property
    def probe(self) -> str:
        """A file that must be there."""
        return self.file or PROBES[self.kind]

    @property
    def folder(self) -> Path | None:
        """Where the cache has it, complete or not; None = nowhere."""
        for file in (self.probe, *self.instead):
            try:
                found = try_to_load_from_cache(self.name, file, cache_dir=constants.HF_HUB_CACHE)
            except HFValidationError:
                return None
            if isinstance(found, str):
                return Path(found).parents[file.count("/")]
        return None

    @property
    def missing(self) -> list[str]:
        """What the cache lacks; empty = all is there."""
        folder = self.folder
        if folder is None:
            return [self.probe]
        if self.kind == "policy":
            return model_files.missing_of_policy(folder)
        if self.image is not None:
            return model_files.missing_of_pipeline(folder, self.image)
        return model_files.missing_of_reward(folder) if self.kind == "reward" else []

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Of the repository's file names, those to have. Reads ``model_index.json`` of a pipeline, over the network."""
        if self.file:
            return [self.file]
        if self.kind == "policy":
            return model_files.files_of_policy(names)
        if self.image is not None:
            index = json.loads(Path(_download(self.name, self.probe)).read_text(encoding="utf-8"))
            return model_files.files_of_pipeline(names, index, self.image)
        return model_files.files_of_reward(names) if self.kind == "reward" else model_files.files_of_tokenizer(names)


@dataclass(frozen=True)
class Download:
    """What a repository still has to send: names and bytes of its files."""

    repository: Repository
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(size for _, size in self.files)

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.repository.name} must be downloaded first, {self.bytes / GB:.2f} GB."


def repositories(config: RunConfig) -> list[Repository]:
    """The repositories that a run reads; none for embedded models and folders."""
    models = config.models
    found = []
    if _is_repository(models.policy.path):
        found.append(Repository("models.policy.path", models.policy.path, "policy"))
    if _is_repository(models.image.path):
        found.append(Repository("models.image.path", models.image.path, "image", image=models.image))
    found += _reward_repositories(config)
    if is_hub_file(models.reward.aesthetic):
        name, _, file = models.reward.aesthetic.rpartition("/")
        found.append(Repository("models.reward.aesthetic", name, "file", file))
    return found


def is_hub_file(path: str) -> bool:
    """Whether ``path`` means a file of a repository (owner/name/file) and not one on this disk."""
    return path.count("/") == 2 and not path.startswith(("/", ".", "~")) and not Path(path).exists()


def hub_file(path: str) -> Path:
    """Where the cache has the file that ``path`` (owner/name/file) means, after :func:`fetch`."""
    name, _, file = path.rpartition("/")
    return Path(_download(name, file))


def _is_repository(path: str) -> bool:
    return path != "tiny" and not path.startswith(("/", ".", "~")) and not Path(path).is_dir()


def _reward_repositories(config: RunConfig) -> list[Repository]:
    path, tag = config.models.reward.path, config.models.reward.pretrained
    if not _is_repository(path):
        return []
    if path.startswith("hf-hub:"):
        return [Repository("models.reward.path", path.removeprefix("hf-hub:"), "reward")]
    import open_clip

    found = []
    stored = str((open_clip.get_pretrained_cfg(path, tag) or {}).get("hf_hub", "")) if tag else ""
    if stored:
        name, _, file = stored.rpartition("/")  # as open_clip writes it: owner/name/file, the file may be empty
        file = file or "open_clip_pytorch_model.bin"
        safe = (
            "open_clip_model.safetensors" if file == "open_clip_pytorch_model.bin" else f"{Path(file).stem}.safetensors"
        )
        found.append(Repository("models.reward.pretrained", name, "file", safe, instead=(file,)))
    text = (open_clip.get_model_config(path) or {}).get("text_cfg", {})
    if tokenizer := text.get("hf_tokenizer_name"):
        found.append(Repository("models.reward.path", tokenizer, "tokenizer"))
    return found


# -- before a run --------------------------------------------------------------------------------------------


def check(config: RunConfig) -> list[Download]:
    """What a run has to download; asks the hub only about what the cache lacks.

    Raises:
        HubError: it can't be had, or there is no room for it.
    """
    found = [look_up(repository) for repository in repositories(config) if repository.missing]
    _require_room(found)
    return found


def require_folder(setting: str, path: str, missing: Sequence[str]) -> None:
    """Refuse a folder that lacks files.

    Raises:
        ConfigError: one sentence that names the first of them.
    """
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise ConfigError(
            f"{setting} is {path!r}, but that folder has no {missing[0]}{more}; copy the whole model there, or name "
            "another."
        )


_answers: dict[tuple[str, Repository, str | None], tuple[float, Download]] = {}
_silent_until: dict[str, float] = {}  # by endpoint


def look_up(repository: Repository) -> Download:
    """Ask the hub what of ``repository`` is not in the cache yet; raises :class:`HubError`.

    A hub that can't be reached is left alone for a few seconds: a form that is being filled in asks at every change.
    """
    key = (constants.ENDPOINT, repository, get_token())
    then, known = _answers.get(key, (0.0, None))
    if known is not None and time.monotonic() - then < REMEMBERED:
        return known
    with explained(repository):
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled("nothing was asked")
        if time.monotonic() < _silent_until.get(constants.ENDPOINT, 0.0):
            raise LocalEntryNotFoundError("not asked again so soon")
        try:
            found = _ask(repository)
        except HfHubHTTPError:
            raise
        except TransportError:
            _silent_until[constants.ENDPOINT] = time.monotonic() + TIMEOUT
            raise
    _answers[key] = time.monotonic(), found
    return found


def _ask(repository: Repository) -> Download:
    """What :func:`look_up` returns, from the hub itself; raises what its client raises."""
    info = HfApi(endpoint=constants.ENDPOINT).model_info(repository.name, files_metadata=True, timeout=TIMEOUT)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    stored = next((file for file in (repository.probe, *repository.instead) if file in sizes), "")
    if repository.file and stored:
        repository = replace(repository, file=stored)
    if repository.probe not in sizes:
        what = "no such file" if repository.file else f"no {repository.probe}, so no model of this kind"
        raise HubError(
            f"{repository.setting} names {repository.name!r} on the hub, which has {what} "
            f"({repository.probe}); name another."
        )
    # A gated repository lists its files to everybody, and gives them only to those who may have them.
    url = hf_hub_url(repository.name, repository.probe, endpoint=constants.ENDPOINT)
    get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=constants.ENDPOINT)
    wanted = [name for name in repository.wanted(list(sizes)) if name in sizes]
    kept = [name for name in wanted if not _is_cached(repository.name, name, info.sha)]
    return Download(repository, tuple((name, sizes[name]) for name in kept))


def _is_cached(name: str, file: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(name, file, cache_dir=constants.HF_HUB_CACHE, revision=commit), str)


def _require_room(downloads: Sequence[Download]) -> None:
    needed = sum(download.bytes for download in downloads)
    folder = Path(constants.HF_HUB_CACHE).expanduser()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > free:
        names = " and ".join(download.repository.name for download in downloads)
        raise HubError(
            f"{names} must be downloaded ({needed / GB:.1f} GB), but the disk of the cache folder {folder} has only "
            f"{free / GB:.1f} GB free; free some space, or set HF_HOME to a folder on a larger disk."
        )


# -- the download --------------------------------------------------------------------------------------------


def fetch_tokenizer(config: RunConfig) -> None:
    """Download what the reward's tokenizer is read from, if that is not in the cache: a few MB.

    Raises:
        HubError: see :func:`check`.
    """
    for repository in _reward_repositories(config):
        if repository.kind in ("reward", "tokenizer") and repository.folder is None:
            found = look_up(repository)
            texts = tuple((name, size) for name, size in found.files if name.endswith(model_files.TEXTS))
            _fetch_one(replace(found, files=texts), lambda name, done, total: None)


def fetch(config: RunConfig, told: Told) -> None:
    """Download what the cache lacks; ``told("downloading ... (MB)", done, total)`` hears how far it is.

    An exception that ``told`` raises ends the download.

    Raises:
        HubError: see :func:`check`; or the download broke off.
    """
    _answers.clear()
    try:
        for download in check(config):
            _fetch_one(download, told)
            if lacks := download.repository.missing:
                raise HubError(
                    f"{download.repository.name} was downloaded, but has no {lacks[0]}; "
                    f"{download.repository.setting} must name a complete model."
                )
    finally:
        _answers.clear()  # what is still to come is no longer what it was


def _fetch_one(download: Download, told: Told) -> None:
    repository, done = download.repository, 0
    progress = _Progress(told, f"downloading {repository.name} (MB)", download.bytes)
    for name, size in download.files:
        progress.before, progress.now = done, 0
        progress.say()
        try:
            with explained(repository, f"{name}, with {done / MB:.0f} of {download.bytes / MB:.0f} MB here"):
                _download(repository.name, name, progress.bar())
        finally:
            if progress.stopped is not None:
                raise progress.stopped
        done += size
    progress.before, progress.now = done, 0
    progress.say()


def _download(repository: str, file: str, bar: type[tqdm] | None = None) -> str:
    return hf_hub_download(
        repository,
        file,
        cache_dir=constants.HF_HUB_CACHE,
        endpoint=constants.ENDPOINT,
        etag_timeout=TIMEOUT,
        tqdm_class=bar,
    )


class _Progress:
    """Counts bytes for ``told``; what it raises is kept, for a downloader in another language drops it."""

    def __init__(self, told: Told, name: str, total: int) -> None:
        self.told, self.name, self.total = told, name, total
        self.before = self.now = 0
        self.stopped: BaseException | None = None

    def say(self) -> None:
        done = min(self.before + self.now, self.total)
        self.told(self.name, done // MB, max(1, self.total // MB))

    def bar(self) -> type[tqdm]:
        """A progress bar's class for the hub's client, which may open two of them for one file."""
        progress = self

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **(named | {"file": io.StringIO(), "disable": False}))

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                progress.now = max(progress.now, int(self.n))
                if progress.stopped is None:
                    try:
                        progress.say()
                    except BaseException as stop:
                        progress.stopped = stop
                        raise
                return shown

        return Bar


# -- what went wrong -----------------------------------------------------------------------------------------


@contextmanager
def explained(repository: Repository, during: str = "") -> Iterator[None]:
    """Errors of the hub's client become one sentence; ``during``: the file that was being written, and how far."""
    try:
        yield
    except HubError:
        raise
    except (HfHubHTTPError, TransportError, HFValidationError, EntryNotFoundError, OSError) as error:
        raise HubError(_sentence(error, repository, during)) from error
    except ValueError as error:  # a model_index.json that is none
        raise HubError(f"{repository.name} on the hub has a {repository.probe} that can't be read.") from error


def _sentence(error: Exception, repository: Repository, during: str) -> str:
    name, setting = repository.name, repository.setting
    head = f"{setting} is {name!r}" if repository.kind in ("policy", "image") else f"{setting} needs {name!r}"
    chain = list(_causes(error))
    token = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token that is logged in here"
    if isinstance(error, HFValidationError):
        return f"{head}, which is no folder here and no name of a hub repository (owner/name); correct it."
    if isinstance(error, GatedRepoError):
        way = (
            f"and {token} has no access to it: accept its licence on its page with that account, or use another token"
            if get_token()
            else "and no token is set: accept its licence on its page, then set HF_TOKEN to a token of your account"
        )
        return f"{head}, a gated repository, {way}."
    if isinstance(error, RepositoryNotFoundError):
        private = (
            f"or it is private and {token} has no access" if get_token() else "or it is private and needs HF_TOKEN"
        )
        return (
            f"{head}, but there is no such folder here and no such repository on the hub, {private}; correct the name."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return (
                f"{head}, but the hub refuses {token} as invalid or expired; set HF_TOKEN to a valid one, or unset it."
            )
        if isinstance(error, EntryNotFoundError):
            return f"{head}, but that repository has no file {repository.probe}; correct the name."
        return f"{_broken_off(head, during)}: the hub answered with error {status}; {_again(during)}."
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        lacks = f"lacks {repository.missing[0]}" if repository.folder else "does not have it"
        return (
            f"{head}, but the cache {constants.HF_HUB_CACHE} {lacks}, and offline mode (HF_HUB_OFFLINE) forbids to "
            "download it; unset that, or fetch the model where there is a network and copy it here."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"{_broken_off(head, during)}: the disk of the cache folder {constants.HF_HUB_CACHE} is full; free some "
            f"space or set HF_HOME to a folder on a larger disk, then {_again(during)}."
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{head}, but the cache folder {constants.HF_HUB_CACHE} can't be written; set HF_HOME to a folder that can."
        )
    if during:
        return f"{_broken_off(head, during)}: the connection was lost; {_again(during)}."
    if isinstance(error, (TransportError, LocalEntryNotFoundError)):
        return (
            f"{head}, which is not in the cache {constants.HF_HUB_CACHE}, and the hub can't be reached; connect this "
            "machine to the network, or give the folder of a copy."
        )
    return f"{head}, which could not be read: {str(error).splitlines()[0].rstrip('.')}."


def _broken_off(head: str, during: str) -> str:
    return f"{head}, whose download broke off at {during}" if during else head


def _again(during: str) -> str:
    return "start again: whole files are kept and not downloaded twice" if during else "try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
