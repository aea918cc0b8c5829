"""An export as a repository on the Hugging Face Hub: only ever when it is asked for by name.

Invariants:
    - Nothing is uploaded into a repository that holds something else than an export of this program.
    - An export that should be private never goes into a public repository.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from .config import ConfigError
from .export import METRICS_FILE
from .hub import TransportError
from .model_card import HUB_ID

log = logging.getLogger(__name__)

EXPORT_FILES = {"README.md", "config.yaml", METRICS_FILE}  # in every export


class PushFailed(Exception):
    """The hub did not take an export; one plain sentence."""


def check_repository(repository: str) -> None:
    """Refuse what can be refused before anything is exported.

    Raises:
        ConfigError: no ``owner/name``, offline mode, or nobody is logged in.
    """
    if not re.fullmatch(HUB_ID, repository) or len(repository) > 96 or re.search(r"--|\.\.|\.git$", repository):
        raise ConfigError(
            f"--push is {repository!r}, but it should be owner/name: letters, digits, '-', '_' and '.', at most 96 in "
            "all, without '--' and '..'."
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or export without --push.")
    if get_token() is None:
        raise ConfigError(
            "Nobody is logged in to the hub; set HF_TOKEN to a token that may write, or run 'hf auth login', then "
            "export again."
        )


def push(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload the export in ``folder`` as one state of ``repository``, making it if need be; returns its address.

    Raises:
        PushFailed: the repository holds something else or is public where it should not be, or the hub refused.
    """
    api = HfApi()
    try:
        _check_content(api, repository, private)
        api.create_repo(repository, private=True if private else None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            delete_patterns="*",  # what an earlier export had and this one has not
        )
    except PushFailed:
        raise
    except Exception as error:  # whatever the libraries below the hub's raise, it is the upload that failed
        log.debug("push to %s failed", repository, exc_info=True)
        raise PushFailed(_sentence(error, repository, api.endpoint)) from error
    return f"{api.endpoint}/{repository}"


def _check_content(api: HfApi, repository: str, private: bool) -> None:
    try:
        there = api.model_info(repository)
    except RepositoryNotFoundError:
        return
    files = {sibling.rfilename for sibling in there.siblings or ()} - {".gitattributes"}
    if files and not files >= EXPORT_FILES:
        raise PushFailed(
            f"{repository} holds something else than an export, such as {min(files)}; push to another name."
        )
    if private and not there.private:
        raise PushFailed(f"{repository} is public already; make it private on the hub first, or push to another name.")


def _sentence(error: Exception, repository: str, endpoint: str) -> str:
    owner = repository.partition("/")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "The hub does not accept the token (401); make a new one that may write, and set HF_TOKEN to it."
        if status == 403:
            return (
                f"The token may not write to {repository} (403); it needs the permission to write, and its user to be "
                f"{owner} or a member of it."
            )
        if status == 404:
            return f"The hub knows no {repository} that this token may write to (404); check the owner's name."
        if status == 429 or status >= 500:
            return f"The hub at {endpoint} has trouble just now ({status}); try again later."
        told = " ".join((error.server_message or "no reason given").split())
        return f"The hub refused {repository} ({status}: {told})."
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return f"The hub at {endpoint} can't be reached ({error}); check the network, then push again."
    told = " ".join(str(error).split())[:300]
    return f"The upload to {repository} broke off ({type(error).__name__}: {told}); push again, what is there is kept."
