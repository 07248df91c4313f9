"""Files of the model hub, through huggingface_hub: its cache, token, mirror (HF_ENDPOINT) and offline mode."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from vqpipe.downloads.addresses import HUB, HubFile, check_repository
from vqpipe.downloads.web import Megabytes
from vqpipe.errors import WeightsError
from vqpipe.files import reason
from vqpipe.progress import Progress

SECONDS = 3.0
"""Timeout of the first request to the hub, after which the machine counts as offline."""
LOGIN = "run `hf auth login`, or set HF_TOKEN"


def fetch_from_hub(file: HubFile, found: Path | None, by_hand: str, progress: Progress) -> Path:
    """Download a file of the hub, if the cached one, `found`, is not the current one or the hub cannot be reached."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        if found is not None:
            return found
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no connection to {constants.ENDPOINT}"
        raise WeightsError(f"{file} is not in the cache and cannot be downloaded: {why}", by_hand)
    options: dict[str, Any] = {}
    if "tqdm_class" in signature(huggingface_hub.hf_hub_download).parameters:  # not in the first versions 1.x
        options["tqdm_class"] = bar_class(progress, file.path)
    with hub_errors(f"{file} cannot be downloaded", file.repository, by_hand):
        return Path(huggingface_hub.hf_hub_download(file.repository, file.path, revision=file.revision, **options))


def fetch_repository(repository: str, revision: str | None, patterns: list[str], by_hand: str) -> Path:
    """Download the files of a repository that match `patterns`, or find them in the cache.

    Raises:
        WeightsError: neither is possible.
    """
    import huggingface_hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)
    name = f"{HUB}{repository}" + (f"@{revision}" if revision else "")
    with hub_errors(f"{name} cannot be downloaded", repository, by_hand):
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )


def upload_folder(repository: str, folder: Path, *, private: bool) -> str:
    """Upload the files of a folder to a repository, which is made if it is absent; return the URL of the commit.

    Raises:
        ConfigError: the repository is not OWNER/NAME.
        WeightsError: there is no token, no permission or no connection; or with `private`, the repository is public.
    """
    from huggingface_hub import HfApi, constants, get_token

    failed = f"cannot upload to {HUB}{check_repository(repository)}"
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{failed}: HF_HUB_OFFLINE is set", "Unset it where there is a network")
    if get_token() is None:
        raise WeightsError(f"{failed}: no token of the hub was found", f"To log in, {LOGIN}")
    if not reachable(constants.ENDPOINT):
        raise WeightsError(
            f"{failed}: no connection to {constants.ENDPOINT}", "Run the command where there is a network"
        )
    with hub_errors(failed, repository, "Run the command again"):
        api = HfApi()
        api.create_repo(repository, private=True if private else None, exist_ok=True)
        if private and api.model_info(repository).private is False:  # one that exists stays as it is
            raise WeightsError(
                f"{failed}: the repository exists and is public",
                f"Name a new one, or make it private in https://huggingface.co/{repository}/settings",
            )
        message = "Upload a tokenizer with vqpipe"
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))


@contextmanager
def hub_errors(failed: str, repository: str, by_hand: str) -> Iterator[None]:
    """Raise the errors of huggingface_hub as a WeightsError of one line that begins with `failed`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise WeightsError(
            f"{failed}: access to it must be granted",
            f"Accept its terms at https://huggingface.co/{repository}, then {LOGIN}",
        ) from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{failed}: {constants.ENDPOINT} has no repository {repository}, or it is private",
            f"Check the name; for a private one, {LOGIN}",
        ) from None
    except errors.RevisionNotFoundError:
        raise WeightsError(f"{failed}: no such revision", f"See https://huggingface.co/{repository}/commits") from None
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"
        cause = error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        raise WeightsError(f"{failed}: {f'HTTP status {status}' if status else offline}", by_hand) from None
    except errors.EntryNotFoundError:
        raise WeightsError(
            f"{failed}: no such file in {repository}", f"See https://huggingface.co/{repository}/tree/main. {by_hand}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise WeightsError(f"{failed}: HTTP status {status}", f"For a private or gated one, {LOGIN}") from None
        raise WeightsError(f"{failed}: HTTP status {status}", by_hand) from None
    except errors.HFValidationError:
        raise WeightsError(f"{failed}: {repository!r} is not a valid name", "Write OWNER/NAME") from None
    except OSError as error:
        raise WeightsError(f"{failed}: {reason(error)[:160]}", by_hand) from None
    except Exception as error:  # of the connection; the client's library for HTTP is not a dependency of ours
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "hf_xet"):
            raise
        raise WeightsError(f"{failed}: {type(error).__name__}: {reason(error)[:120]}", by_hand) from None


def bar_class(progress: Progress, title: str) -> type:
    """A class in place of tqdm's, with which huggingface_hub reports bytes to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.bytes = Megabytes(progress, title, options.get("total"), options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.bytes.advance(int(n or 0))

    return Bar


def commit_of(path: Path) -> str | None:
    """The commit of a file in the cache of the hub, which is in its path."""
    parts = path.parts
    place = parts.index("snapshots") + 1 if "snapshots" in parts else len(parts)
    return parts[place] if place < len(parts) - 1 else None


def reachable(url: str) -> bool:
    """Whether the hub responds. (The hub's own client retries for half a minute.)"""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
