"""Remote files: downloaded because they were named, and found again in a cache.

    hf:OWNER/NAME/FILE[@REVISION]    a file of the model hub (hub.py)
    http://..., https://...          a file of a web server (web.py)

All errors are one line. `by_hand` is the hint of those about files that could not be downloaded: how to get the file in
another way, and the command that takes it.
"""

import os
import re
from pathlib import Path

from vqpipe.downloads.addresses import Address, HubFile, Url, check_repository, parse, split_repository
from vqpipe.downloads.hub import commit_of, fetch_from_hub, fetch_repository, upload_folder
from vqpipe.downloads.web import fetch_url, url_folder
from vqpipe.errors import WeightsError
from vqpipe.files import hash_file
from vqpipe.progress import SILENT, Progress

__all__ = [
    "Address",
    "HubFile",
    "Url",
    "cached",
    "check_repository",
    "commit_of",
    "fetch",
    "fetch_repository",
    "parse",
    "server",
    "split_repository",
    "upload_folder",
]


def cached(address: Address) -> Path | None:
    """The file in the cache, without a look at the network; None if it is not there."""
    if isinstance(address, Url):
        path = url_folder(address) / address.path
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(address.repository, address.path, revision=address.revision)
    except ValueError:  # not the name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def server(address: Address) -> str:
    """The server that a file is downloaded from; for the hub, it may be a mirror."""
    if isinstance(address, Url):
        return str(address).removesuffix(address.path)
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def fetch(address: Address, by_hand: str, *, sha256: str = "", progress: Progress = SILENT) -> Path:
    """Return the file, downloaded if it is not in the cache.

    Args:
        sha256: of the file, if known. A cached file with this hash is used without a look at the network.

    Raises:
        WeightsError: it cannot be downloaded, or has another hash.
    """
    found = cached(address)
    if found is not None and sha256 and hash_file(found) == sha256:
        return found
    if isinstance(address, Url):
        path = found or fetch_url(address, by_hand, progress)
    else:
        path = fetch_from_hub(address, found, by_hand, progress)
    if sha256 and (actual := hash_file(path)) != sha256:
        raise wrong_hash(path, address, sha256, actual)
    return path


def wrong_hash(path: Path, address: Address, sha256: str, actual: str) -> WeightsError:
    """The error of a file with another hash. A damaged copy is deleted; a whole file is kept aside."""
    what = f"{path.name} from {address} has sha256 {actual}, not {sha256}"
    blob = path.resolve()
    if isinstance(address, HubFile) and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != actual:
        path.unlink(missing_ok=True)  # the hub names a large file by its hash: this copy is not what it sent
        blob.unlink(missing_ok=True)
        return WeightsError(what, "The copy in the cache was damaged and has been deleted: run the command again")
    if isinstance(address, Url):
        kept = path.with_name(f"refused-{path.name}")
        os.replace(path, kept)
        path = kept
    return WeightsError(
        what,
        f"The download was damaged, or its publisher has replaced the file. It is kept as {path}; if you trust it, "
        "pass that path in place of the name",
    )
