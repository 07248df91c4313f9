"""Files of web servers, in $XDG_CACHE_HOME/vqpipe/downloads. An interrupted download is continued by the
next call."""

import fcntl
import hashlib
import json
import os
import shutil
import string
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from vqpipe.downloads.addresses import Url
from vqpipe.errors import WeightsError
from vqpipe.files import free_space, reason
from vqpipe.progress import Progress

TIMEOUT = 30.0
"""Seconds without a byte that end a connection."""
CHUNK = 1 << 20
CONTINUE = "Run the same command again to continue"


def url_folder(url: Url) -> Path:
    """The folder of a URL in the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vqpipe" / "downloads" / hashlib.sha256(url.address.encode()).hexdigest()[:16]


class Megabytes:
    """Reports bytes to a `Progress` in whole megabytes."""

    def __init__(self, progress: Progress, title: str, total: int | None, done: int = 0) -> None:
        self.progress, self.done = progress, done
        progress.start(f"download {title}", None if total is None else round(total / 1e6), "MB", round(done / 1e6))

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        before, self.done = round(self.done / 1e6), self.done + count
        if after := round(self.done / 1e6) - before:
            self.progress.advance(after)


def fetch_url(url: Url, by_hand: str, progress: Progress) -> Path:
    """Download a file from a web server into the cache, and resume an interrupted download of the same version."""
    folder = url_folder(url)
    target, partial = folder / url.path, folder / f"{url.path}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be downloading it
            if not target.is_file():
                download(url, partial, by_hand, progress)
                os.replace(partial, target)
                version_file(partial).unlink(missing_ok=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException, ValueError) as error:
        begun = partial.is_file() and not isinstance(error, urllib.error.HTTPError)
        raise connection_error(url, error, CONTINUE if begun else by_hand) from None  # ValueError: it is no URL
    except OSError as error:
        raise WeightsError(
            f"cannot write {partial}: {reason(error)} ({free_space(partial)} are free)",
            "Set XDG_CACHE_HOME to a folder with enough space and run the command again",
        ) from None
    return target


def version_file(partial: Path) -> Path:
    """Where the version of a partial download is noted."""
    return partial.with_name(f"{partial.name}.json")


def connection_error(url: Url, error: Exception, hint: str) -> WeightsError:
    """The error of a failed connection to a web server."""
    if isinstance(error, urllib.error.HTTPError):
        why = f"HTTP status {error.code}"
        if error.code in (401, 403):
            why += ", it needs a login or a permission"
    else:
        why = (
            reason(error.reason)
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception)
            else reason(error)
        )
    return WeightsError(f"{url} cannot be downloaded: {why}", hint)


def download(url: Url, partial: Path, by_hand: str, progress: Progress) -> None:
    """Download a URL into a partial file, or continue it.

    The server's ETag or Last-Modified is noted beside the partial file, and sent back to continue it, so that the parts
    are of one version. Without either, a download begins again.

    Raises:
        WeightsError: the server sends a web page, or not all of the file; or it does not fit the disk.
        URLError, OSError: the connection fails.
    """
    version = noted_version(partial)
    start = partial.stat().st_size if version and partial.exists() else 0
    address = urllib.parse.quote(url.address, safe=string.punctuation)
    request = urllib.request.Request(address, headers={"User-Agent": "vqpipe", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing after `start`: the partial file is whole, or of another version.
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] != str(start):
            partial.unlink()
            download(url, partial, by_hand, progress)
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise WeightsError(f"{url} is a web page, not a file of weights", by_hand)
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if total is not None and shutil.disk_usage(partial.parent).free < total - start:
            raise WeightsError(
                f"{url} needs {(total - start) / 1e6:,.1f} MB in {partial.parent}, {free_space(partial)} are free",
                "Free some space, or set XDG_CACHE_HOME to a folder with enough",
            )
        done = Megabytes(progress, url.path, total, start)
        with partial.open("r+b" if start else "wb") as file:
            if start:
                file.seek(start)
            else:  # the file is empty now; an answer with the rest may lack the time of the last change
                note_version(partial, response.headers)
            while block := response.read(CHUNK):
                file.write(block)
                done.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done.done < total:
        raise WeightsError(
            f"{url} cannot be downloaded: the connection ended at byte {done.done:,} of {total:,}",
            CONTINUE,
        )


def noted_version(partial: Path) -> str:
    """The noted version of a partial file; empty if there is none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads(version_file(partial).read_text(encoding="utf-8"))["version"])
    return ""


def note_version(partial: Path, headers: Any) -> None:
    """Note the version that the server sends: an ETag that promises equal bytes, or the time of the last change."""
    etag = headers.get("ETag") or ""
    version = headers.get("Last-Modified") or "" if etag.startswith("W/") or not etag else etag
    version_file(partial).write_text(json.dumps({"version": version}), encoding="utf-8")
