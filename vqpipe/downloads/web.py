"""Files of web servers, in $XDG_CACHE_HOME/vqpipe/downloads. An interrupted download is resumed."""

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
ATTEMPTS = 5
"""Connections without a new byte, after which a download ends."""
CHUNK = 1 << 20


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
        """`count` more bytes are done; fewer, if it is negative."""
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
                Download(url, partial, progress).run(by_hand)
                os.replace(partial, target)
                version_file(partial).unlink(missing_ok=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException, ValueError) as error:
        raise connection_error(url, error, by_hand) from None  # ValueError: it is no URL
    except OSError as error:
        raise WeightsError(
            f"cannot write {partial}: {reason(error)} ({free_space(partial)} are free)",
            "Set XDG_CACHE_HOME to a folder with enough space and run the command again",
        ) from None
    return target


def version_file(partial: Path) -> Path:
    """Where the version of a partial download is noted."""
    return partial.with_name(f"{partial.name}.json")


def connection_error(url: Url, error: Exception, by_hand: str) -> WeightsError:
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
    return WeightsError(f"{url} cannot be downloaded: {why}", by_hand)


class Download:
    """A download of a URL into a partial file.

    The server's ETag or Last-Modified is noted beside the partial file, and sent back to continue it, so that the parts
    are of one version. Without either, a download begins again.
    """

    def __init__(self, url: Url, partial: Path, progress: Progress) -> None:
        self.url, self.partial, self.progress = url, partial, progress
        self.megabytes: Megabytes | None = None

    def run(self, by_hand: str) -> None:
        """Download all, over several connections if they break.

        Raises:
            WeightsError: the server sends a web page, or the file stays incomplete, or does not fit the disk.
            URLError, OSError: the connection fails.
        """
        failures = 0
        while True:
            before = self.size()
            try:
                missing = self.continue_download(by_hand)
            except (TimeoutError, ConnectionError, HTTPException):
                missing = 1
                if self.size() == before and failures + 1 >= ATTEMPTS:
                    raise
            if not missing:
                return
            failures = failures + 1 if self.size() <= before else 0
            if failures >= ATTEMPTS:
                raise WeightsError(
                    f"{self.url} cannot be downloaded: {ATTEMPTS} connections ended at byte {self.size():,}",
                    "Run the same command again to continue",
                )

    def size(self) -> int:
        """Bytes that are in the partial file."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def continue_download(self, by_hand: str) -> int:
        """Open one connection and append what it sends; return how many bytes are still missing."""
        version = self.version()
        start = self.size() if version else 0
        address = urllib.parse.quote(self.url.address, safe=string.punctuation)
        request = urllib.request.Request(address, headers={"User-Agent": "vqpipe", "Accept-Encoding": "identity"})
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", version)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # nothing after `start`: the partial file is whole, or of another version
                if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(start):
                    return 0
                self.partial.unlink()
                return 1
            raise
        with response:
            if response.status != 206:
                start = 0
            if response.headers.get_content_type() == "text/html":
                raise WeightsError(f"{self.url} is a web page, not a file of weights", by_hand)
            length = response.headers.get("Content-Length")
            total = start + int(length) if length and length.isdigit() else None
            self.check_space(total, start)
            self.note_version(response.headers)
            self.begin(total, start)
            with self.partial.open("r+b" if start else "wb") as file:
                file.seek(start)
                while block := response.read(CHUNK):
                    file.write(block)
                    self.count(len(block))
                file.flush()
                os.fsync(file.fileno())
        return 0 if total is None else max(0, total - self.size())

    def begin(self, total: int | None, start: int) -> None:
        """Start the display at `start`, or set it back to it."""
        if self.megabytes is None:
            self.megabytes = Megabytes(self.progress, self.url.path, total, start)
        self.megabytes.advance(start - self.megabytes.done)

    def count(self, count: int) -> None:
        assert self.megabytes is not None
        self.megabytes.advance(count)

    def check_space(self, total: int | None, start: int) -> None:
        """Raise a WeightsError if the file does not fit the disk."""
        if total is not None and shutil.disk_usage(self.partial.parent).free < total - start:
            needed = f"{(total - start) / 1e6:,.1f} MB in {self.partial.parent}"
            raise WeightsError(
                f"{self.url} needs {needed}, {free_space(self.partial)} are free",
                "Free some space, or set XDG_CACHE_HOME to a folder with enough",
            )

    def version(self) -> str:
        """The noted version of the partial file; empty if there is none."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return str(json.loads(version_file(self.partial).read_text(encoding="utf-8"))["version"])
        return ""

    def note_version(self, headers: Any) -> None:
        """Note the version that the server sends: an ETag that promises equal bytes, or the time of the last change."""
        etag = headers.get("ETag") or ""
        version = headers.get("Last-Modified") or "" if etag.startswith("W/") or not etag else etag
        version_file(self.partial).write_text(json.dumps({"version": version}), encoding="utf-8")
