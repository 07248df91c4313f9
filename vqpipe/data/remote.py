"""Shards behind URLs of fsspec (s3://, gs://, http(s)://, hf://, ...): listing, reads of byte ranges, retries, errors.

All use of fsspec for images is in this file. Every request runs on a daemon thread, because fsspec's own calls may wait
for a stalled server without limit: a request ends at its time limit, and a signal is handled while it waits.
"""

import glob
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.spec import AbstractBufferedFile

from vqpipe.errors import DataError
from vqpipe.provenance import without_secrets

ResultT = TypeVar("ResultT")
Validators = tuple[tuple[str, str], ...]
"""Facts of a file that change with it, such as its ETag: (name, value)."""

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 30.0
"""Longest wait for the next byte of an HTTP server, S3 or GCS."""
TOTAL_SECONDS = 240.0
"""Longest time of one listing or read with its retries; less than the loader waits for a batch (`through_workers`)."""
ATTEMPTS = 8
THREADS = 8
FIRST_DELAY, LONGEST_DELAY = 0.5, 20.0
"""Seconds before the first retry, doubled for each one that follows, and halved at random."""
BLOCK = 4 << 20
"""Bytes of one request while a shard is indexed."""
POLL_SECONDS = 0.2
"""Time between two checks of `stop_flag`."""

HTTP_VALIDATORS = ("ETag", "Last-Modified")
VALIDATORS = (
    *("ETag", "etag", "md5Hash", "crc32c", "generation", "blob_id", "sha"),
    *("LastModified", "last_modified", "updated", "modified", "modify", "mtime", "created"),
)
"""Keys of fsspec's `info` that are validators."""
CHECK_SECONDS = 600.0
"""Only HTTP responses contain the validators beside the bytes. On other file systems, the validators of a file are
requested before its first read in each process, and again after this time."""
checked: dict[str, float] = {}
"""URL -> when this process requested the validators."""

RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
BROKEN_TLS = {"SSLEOFError", "SSLZeroReturnError"}
BROKEN_CONNECTION = {
    *("ConnectionError", "IncompleteReadError", "IncompleteRead", "ShortRead"),
    *("ServerDisconnectedError", "ClientPayloadError", "ClientOSError"),  # aiohttp
    *("ConnectionClosedError", "ResponseStreamingError"),  # botocore
    *("NetworkError", "RemoteProtocolError", "ChunkedEncodingError", "ProtocolError"),  # httpx, requests, urllib3
    *BROKEN_TLS,
}
"""Class names, because the libraries that define them may not be installed."""
TIMEOUT = {"TimeoutError", "ConnectTimeoutError", "ReadTimeoutError", "TimeoutException", "Timeout"}
NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),  # botocore
    *("TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"),
    *("DefaultCredentialsError", "RefreshError"),  # google.auth
}

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {"hf": "huggingface_hub"}
"""Scheme -> the package that fsspec needs for it."""
S3_LOGIN = (
    "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket set FSSPEC_S3_ANON=true"
)
GCS_LOGIN = (
    "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
    "set FSSPEC_GS_TOKEN=anon"
)
HTTP_LOGIN = (
    "Write user and password to ~/.netrc, or set "
    'FSSPEC_HTTP=\'{"client_kwargs": {"headers": {"Authorization": "Bearer TOKEN"}}}\'; a signed link may have expired'
)
HUB_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
LOGIN = {"s3": S3_LOGIN, "s3a": S3_LOGIN, "gs": GCS_LOGIN, "gcs": GCS_LOGIN}
LOGIN |= {"http": HTTP_LOGIN, "https": HTTP_LOGIN, "hf": HUB_LOGIN}
RUN_AGAIN = "wait and run the command again: what is written is kept"

stop_flag: Any = None
"""In a worker process of the loader: a shared number, not 0 once the main process needs no more images."""


class ShortRead(OSError):
    """The server sent fewer bytes than were requested."""


class TimeLimit(TimeoutError):
    """The request takes longer than TOTAL_SECONDS."""


class NoRanges(OSError):
    """The server answers a request of a byte range with the whole file."""


class RemoteFile(AbstractBufferedFile):
    """A file that `describe` described, read by ranges: each request also gets the BLOCK bytes that follow."""

    def __init__(self, url: str, size: int, validators: Validators) -> None:
        super().__init__(None, url, block_size=BLOCK, size=size)
        self.validators = validators

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read(self.path, start, end - start, self.size, self.validators)


def check_schemes(spec: str) -> None:
    """Raise a DataError where fsspec has no file system for a scheme of the URL, which may be chained (`a::b://c`)."""
    unknown = set(schemes(spec)) - set(fsspec.available_protocols())
    if unknown:
        raise DataError(
            f"{without_secrets(spec)}: no file system for {', '.join(sorted(unknown))}", "Use one of fsspec's"
        )


def schemes(url: str) -> list[str]:
    """The schemes of a URL: one, or several of a chained URL."""
    return [part.split("://")[0] for part in url.split("::")]


def is_http(url: str) -> bool:
    """Whether the URL is read by `fetch`, which checks what fsspec does not."""
    return url.startswith(("http://", "https://")) and "::" not in url


def find_shards(pattern: str) -> list[str]:
    """The URLs that match a glob, sorted. A URL without a wildcard is returned unchecked."""
    magic = any(character in pattern for character in "*[") if is_http(pattern) else glob.has_magic(pattern)
    if not magic:
        return [pattern]

    def find(seconds: float) -> list[str]:
        system, path = file_system(pattern)
        return call(lambda: [system.unstrip_protocol(match) for match in sorted(system.glob(path))], seconds)

    found = with_retries("list", pattern, find)
    if not found and is_http(pattern):
        raise DataError(
            f"no such images: the page of {pattern.rpartition('/')[0]}/ has no links that match",
            "Write the names as {000000..000099}",
        )
    return found


def read(url: str, offset: int, size: int, file_size: int, validators: Validators) -> bytes:
    """Bytes [offset, offset + size) of a shard. No file stays open, for fork and pickle.

    Raises:
        DataError: it is gone, unreadable, or has other validators than the file that was indexed.
    """

    def attempt(seconds: float) -> bytes:
        system, path = file_system(url)
        if is_http(url):
            data, total, now = call(lambda: sync(system.loop, fetch, system, path, offset, offset + size), seconds)
            check_same(url, (file_size, validators), (total, now))
        else:
            if time.monotonic() - checked.get(url, -CHECK_SECONDS) >= CHECK_SECONDS:
                check_same(url, (file_size, validators), describe(url, seconds))
                checked[url] = time.monotonic()
            options = {"cache_type": "none"} if system.protocol == "hf" else {}  # else it reads 5 MB ahead
            data = call(lambda: system.cat_file(path, start=offset, end=offset + size, **options), seconds)
        if len(data) > size:
            raise NoRanges(f"{len(data)} bytes instead of {size}")
        if len(data) < size:
            raise ShortRead(f"{len(data)} of {size} bytes at byte {offset}")
        return data

    return with_retries("read", url, attempt) if size else b""


def check_same(url: str, before: tuple[int, Validators], now: tuple[int, Validators]) -> None:
    """Raise a DataError if a file changed: its size, or all validators that both states have. (The ETags of
    two mirrors may differ.)"""
    old, new = dict(before[1]), dict(now[1])
    known = old.keys() & new.keys()
    if before[0] != now[0] or (known and all(old[name] != new[name] for name in known)):
        raise changed(url)


def changed(url: str) -> DataError:
    """The DataError for a file that changed during a job."""
    return DataError(f"{without_secrets(url)} changed after it was indexed", "Run the command again")


def describe(url: str, seconds: float) -> tuple[int, Validators]:
    """Return the size of a file, and the validators that its server reports.

    Raises:
        DataError: it is a folder, or its size is unknown.
    """
    system, path = file_system(url)
    if is_http(url):  # not `info`: it makes every error a FileNotFoundError, and has no validators
        _, size, validators = call(lambda: sync(system.loop, fetch, system, path, 0, 1), seconds)
        return size, validators

    def request() -> dict[str, Any]:
        with suppress(Exception):  # a file system without such a cache
            system.invalidate_cache(path)
        return system.info(path)

    info = call(request, seconds)
    if info.get("type") == "directory":
        shown = without_secrets(url)
        raise DataError(f"{shown} is a folder", f"Name its tars: {shown.rstrip('/')}/*.tar")
    if info.get("size") is None:
        raise DataError(f"{without_secrets(url)}: its file system does not report its size", "Download it first")
    return int(info["size"]), tuple((name, str(info[name])) for name in VALIDATORS if info.get(name) is not None)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, with time limits, and its path there. The user's settings of fsspec apply."""
    return fsspec.core.url_to_fs(url, **{scheme: options_of(scheme) for scheme in set(schemes(url))})


def options_of(scheme: str) -> dict[str, Any]:
    """The options of a file system: time limits, beside the user's own in FSSPEC_* and fsspec's configuration."""
    own = fsspec.config.conf.get("http" if scheme == "https" else scheme, {})
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        return {"client_kwargs": {"trust_env": True, "timeout": timeout, **own.get("client_kwargs", {})}}
    if scheme in ("s3", "s3a"):
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
        return {"config_kwargs": {**limits, **own.get("config_kwargs", {})}}
    if scheme in ("gs", "gcs"):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # else a traceback for each error
        return {"requests_timeout": own.get("requests_timeout", SILENT_SECONDS)}
    if scheme == "hf":
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # else a line for each retry
        return {"max_workers": 1}  # the end of a process would wait for its threads of a listing
    return {}


async def fetch(system: Any, url: str, start: int, stop: int) -> tuple[bytes, int, Validators]:
    """Bytes [start, stop) by HTTP, the size of the whole file, and its ETag and modification time."""
    session = await system.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    options = {**system.kwargs, "headers": {**system.kwargs.get("headers", {}), **headers}}
    async with session.get(system.encode_url(url), **options) as response:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        validators = tuple((name, response.headers[name]) for name in HTTP_VALIDATORS if name in response.headers)
        if response.status == 416 and total.isdigit():  # the file ends before `start`
            return b"", int(total), validators
        response.raise_for_status()
        if response.status != 206 or not total.isdigit() or span.split("-")[0] != str(start):
            raise NoRanges(f"HTTP {response.status}")
        return await response.read(), int(total), validators


def call(function: Callable[[], ResultT], seconds: float) -> ResultT:
    """Return `function()`, computed on a daemon thread, for which the end of the process does not wait.

    Raises:
        TimeLimit: it takes longer than `seconds`.
    """
    future = Future[ResultT]()
    start_daemon(iter([(future, function)]))
    for _ in waiting(seconds):
        if wait([future], POLL_SECONDS).done:
            return future.result()
    raise TimeLimit


def waiting(seconds: float) -> Iterator[float]:
    """Yield the seconds that are left, until there are none; a DataError where the process is to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stop_flag is not None and stop_flag.value:
            raise DataError("a request was interrupted", "Run the command again")
        yield left


def in_threads(function: Callable[..., ResultT], *columns: Sequence[Any]) -> list[ResultT]:
    """`list(map(function, *columns))` on at most THREADS daemon threads. The first error in order is raised.

    Unlike those of a ThreadPoolExecutor, the threads may be left behind at a stalled server by a signal.
    """
    tasks = [(Future[ResultT](), partial(function, *row)) for row in zip(*columns, strict=True)]
    remaining = iter(tasks)
    for _ in tasks[:THREADS]:
        start_daemon(remaining)
    try:
        return [future.result() for future, _ in tasks]
    finally:
        for future, _ in tasks:
            future.cancel()  # of those that have not begun


def start_daemon(tasks: Iterator[tuple[Future[ResultT], Callable[[], ResultT]]]) -> None:
    """Start a daemon thread that computes the results of tasks, which other threads may take from the same iterator."""

    def work() -> None:
        for future, function in tasks:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()


def with_retries(action: str, url: str, attempt: Callable[[float], ResultT]) -> ResultT:
    """Return `attempt(seconds left)`; after an error that may pass, try again, for TOTAL_SECONDS and ATTEMPTS at most.

    Raises:
        DataError: `attempt` failed; the message states what failed and what to do.
    """
    end, before, number = time.monotonic() + TOTAL_SECONDS, None, 0
    while True:
        number += 1
        try:
            return attempt(end - time.monotonic())
        except DataError:
            raise
        except TimeLimit as error:
            raise failure(action, url, before or error, number - 1) from error
        except Exception as error:  # every file system raises errors of its own library
            before = error
            pause = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (number - 1)) * random.uniform(0.5, 1)
            pause = max(pause, retry_after(error))
            if not may_pass(error, action) or number >= ATTEMPTS or time.monotonic() + pause > end:
                raise failure(action, url, error, number) from error
        for left in waiting(pause):
            time.sleep(min(left, POLL_SECONDS))


def may_pass(error: Exception, action: str) -> bool:
    """Whether the same request may succeed later."""
    names = class_names(error)
    if (code := status_of(error)) is not None:
        return code in RETRIED_STATUS
    if names & {"OfflineModeIsEnabled", "NoRanges", "FileNotFoundError", "PermissionError"} | names & NO_CREDENTIALS:
        return False
    if names & {"ConnectionRefusedError", "gaierror"}:  # a wrong address, unless the shard was opened before
        return action == "read"
    if "SSLError" in names and not names & BROKEN_TLS:
        return False
    return bool(names & (BROKEN_CONNECTION | TIMEOUT))


def chain(error: BaseException) -> list[BaseException]:
    """The exception and those that caused it."""
    found = list[BaseException]()
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def class_names(error: BaseException) -> set[str]:
    """The names of the classes of the exception and of those that caused it, with their bases."""
    return {kind.__name__ for each in chain(error) for kind in type(each).__mro__}


def answer_of(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """The HTTP status in an exception of aiohttp, httpx, requests, botocore or gcsfs, and the headers."""
    for each in chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            facts = response.get("ResponseMetadata", {})
            code, headers = facts.get("HTTPStatusCode"), facts.get("HTTPHeaders", {})
        elif response is not None:  # httpx, requests
            code, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
        else:  # aiohttp, gcsfs
            code = getattr(each, "code" if type(each).__name__ == "HttpError" else "status", None)
            headers = getattr(each, "headers", None)
        if isinstance(code, int) and 400 <= code < 600:
            return code, headers or {}
    return None, {}


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception, if there is one."""
    return answer_of(error)[0]


def retry_after(error: BaseException) -> float:
    """The seconds that the server asks to wait; 0 where it does not."""
    headers = answer_of(error)[1]
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    if value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def failure(action: str, url: str, error: Exception, attempts: int = 1) -> DataError:
    """The DataError for a URL that cannot be listed, opened or read."""
    what, hint, code = explain(url, error)
    times = f", {attempts} times" if attempts > 1 else ""
    result = DataError(f"cannot {action} {without_secrets(url)}: {what}{times}", hint)
    result.sysexit_code = code
    return result


def explain(url: str, error: Exception) -> tuple[str, str, int]:
    """What failed, what to do, and the number of sysexits.h."""
    names, status = class_names(error), status_of(error)
    scheme = schemes(url)[-1]
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ImportError):
        if scheme not in PACKAGES:
            return text, "", 69
        missing = next((name for each in chain(error)[::-1] if (name := getattr(each, "name", None))), PACKAGES[scheme])
        if find_spec(missing.partition(".")[0]) is not None:
            return f"the package {missing} is installed, but cannot be imported ({text})", "Repair it", 69
        return f"the package {missing} is not installed", "Install the extra: pip install 'vqpipe[remote]'", 69
    if "NoRanges" in names:
        return "this server does not support Range requests", "Download the file first", 65
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE=1 forbids it", "Unset HF_HUB_OFFLINE, or download the files and give their path", 74
    if "GatedRepoError" in names:
        return "the repository is gated", f"Accept its conditions on its page. {HUB_LOGIN}", 77
    if "RepositoryNotFoundError" in names:
        return "no such repository, or a private one", f"Check the name. {HUB_LOGIN}", 66
    if "RevisionNotFoundError" in names:
        return "the repository has no such revision", "Check the name after @", 66
    if status in (401, 403) or names & NO_CREDENTIALS or "PermissionError" in names or text.startswith("Forbidden"):
        denied = f"access is denied (HTTP {status})" if status else f"no access ({text})"
        return denied, LOGIN.get(scheme, "Set the credentials of this file system"), 77
    if status == 404 or "FileNotFoundError" in names:
        bucket = "NoSuchBucket" in repr(chain(error)) or "bucket does not exist" in text
        absent = "no such bucket" if bucket else "no such file"
        return absent + " or bucket" * (scheme in ("gs", "gcs") and not bucket), "Check the URL", 66
    if status == 429:
        seconds = retry_after(error)
        pause = f"The server asks to wait {seconds:.0f} seconds. Then" if seconds else "The server limits requests:"
        return "too many requests (HTTP 429)", f"{pause} run the command again: what is written is kept", 75
    if status in RETRIED_STATUS:
        return f"the server fails (HTTP {status})", RUN_AGAIN.capitalize(), 75
    if status:
        return f"HTTP {status}: {text}", "Check the URL", 74
    if "gaierror" in names:
        return f"the address of {host_of(error, url)} is not found", "Check the name and the network", 74
    if "SSLError" in names and not names & BROKEN_TLS:
        reason = next(each for each in chain(error)[::-1] if isinstance(each, ssl.SSLError))
        trust = "AWS_CA_BUNDLE" if scheme in ("s3", "s3a") else "SSL_CERT_FILE"
        return (
            f"no TLS connection ({getattr(reason, 'verify_message', '') or reason.reason or reason})",
            f"Check the URL and the clock; {trust} names a file of certificates to trust",
            74,
        )
    if "ConnectionRefusedError" in names:
        return "the connection was refused", "Check the address, and that the server runs", 74
    if names & TIMEOUT:
        return "the server does not answer in time", f"Check the network, or {RUN_AGAIN}", 75
    if names & BROKEN_CONNECTION:
        return f"the connection broke off ({text})", f"Check the network, or {RUN_AGAIN}", 75
    return f"{type(error).__name__}: {text}", "Check the URL and the network", 74


def host_of(error: Exception, url: str) -> str:
    """The host that has no address: that of the URL, or the one a library connects to for it."""
    named = next((host for each in chain(error) if (host := getattr(each, "host", None))), url.split("/")[2])
    return os.environ.get("HF_ENDPOINT", "huggingface.co") if schemes(url)[-1] == "hf" else named
