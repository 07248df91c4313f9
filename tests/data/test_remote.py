"""Remote images against a server on this machine that fails in every way: the message of each failure, what is retried,
and that a signal ends a process that waits for a stalled server."""

import importlib
import json
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from vqpipe.data import remote
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet, open_images
from vqpipe.errors import DataError

Draw = Callable[..., bytes]
Pack = Callable[..., bytes]
REPOSITORY = "datasets/someone/pictures"
ROOT = Path(__file__).resolve().parents[2]


class Handler(BaseHTTPRequestHandler):
    """Answers with a file of the server, or with the next of its faults."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.requests.append((path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.fault
        if fault == "stall":
            self.server.stalled.set()
            self.server.closing.wait(60)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, (int, tuple)):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.answer(status, b"", headers)
        elif path.startswith("api/"):
            self.answer_hub(path)
        else:
            self.answer_file(re.sub("/resolve/[^/]+", "", path), str(fault))

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - cut])
        if cut:
            self.close_connection = True

    def answer_file(self, path: str, fault: str) -> None:
        if path not in self.server.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.server.files[path]
        headers = {
            "ETag": f'"{hash(data)}{self.server.mirror}"',
            "Last-Modified": formatdate(self.server.modified, usegmt=True),
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or fault == "no range":
            return self.answer(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        body = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if fault == "short":  # a complete answer of fewer bytes
            return self.answer(206, body[:-1], headers)
        return self.answer(206, body, headers, cut=len(body) // 2 if fault == "cut" else 0)

    def answer_hub(self, path: str) -> None:
        """What huggingface_hub asks for: the facts of a repository, and the listing of a folder."""
        if self.headers.get("Authorization", "") != self.server.login:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        match = re.fullmatch(f"api/{REPOSITORY}(/revision/[^/]+|/tree/([^/]+)/?(.*))?", path)
        if match is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "nosuch" in path:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        facts: Any = {"id": "someone/pictures", "sha": "0" * 40, "private": False, "tags": [], "downloads": 0}
        if match[2]:
            start = f"{REPOSITORY}/{match[3]}".rstrip("/") + "/"
            inside = {
                name.removeprefix(start): data for name, data in self.server.files.items() if name.startswith(start)
            }
            prefix = f"{match[3]}/".lstrip("/")
            facts = [
                {"type": "directory", "path": prefix + name.partition("/")[0], "oid": "1"}
                if "/" in name
                else {"type": "file", "path": prefix + name, "oid": str(hash(data)), "size": len(data)}
                for name, data in inside.items()
            ]
        return self.answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})


class Server(ThreadingHTTPServer):
    """A web server and a hub, on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.faults: list[Any] = []
        """Of the next requests: an HTTP status, (status, headers), "stall", "reset", "cut", "short", "no range"."""
        self.fault: Any = ""
        """Of all requests after those."""
        self.requests: list[tuple[str, str, str]] = []
        """Path, Range and Authorization of each."""
        self.modified = 1e9
        self.login = self.mirror = ""
        self.stalled, self.closing = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Clients that went away are expected."""


@pytest.fixture
def server(draw: Draw, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with two shards of two images, `/a-0.tar` and `/a-1.tar`, also as a data set of the hub."""
    from huggingface_hub import constants

    server = Server()
    for number in range(2):
        members = {f"{number}{key}.png": draw(2 * number + i) for i, key in enumerate("xy")} | {f"{number}x.cls": b"3"}
        server.files[f"a-{number}.tar"] = server.files[f"{REPOSITORY}/train/a-{number}.tar"] = pack(members)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "TOTAL_SECONDS", 5.0)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(server: Server) -> str:
    """The address of the server, for a test of http:// URLs."""
    pytest.importorskip("aiohttp", reason="http:// needs the extra remote")
    return server.url


HUB = f"hf://{REPOSITORY}/train"


def contents(images: ImageSet) -> list[tuple[str, int | None, int]]:
    return [(sample.key, sample.label, len(sample.image)) for sample in images]


def test_http_shards_are_indexed_and_read_by_range(server: Server, web: str, draw: Draw) -> None:
    images = open_images(f"{web}/a-{{0..1}}.tar")
    assert [images[i].image for i in range(4)] == [draw(i) for i in range(4)]
    assert [sample.key for sample in images] == ["0x", "0y", "1x", "1y"]
    assert images.label(0) == 3
    assert all(asked.startswith("bytes=") for _, asked, _ in server.requests)
    restored = pickle.loads(pickle.dumps(images))
    assert contents(restored) == contents(images)


def test_links_of_a_page_match_a_glob(server: Server, web: str) -> None:
    server.files["list/"] = b'<a href="a-0.tar">a-0.tar</a> <a href="other.txt">other</a>'
    server.files["list/a-0.tar"] = server.files["a-0.tar"]
    assert [sample.key for sample in open_images(f"{web}/list/*.tar")] == ["0x", "0y"]
    with pytest.raises(DataError, match=r"no links that match\. Write the names as \{000000\.\.000099\}"):
        open_images(f"{web}/list/b-*.tar")


def test_query_of_a_signed_link_is_no_glob_and_stays_out_of_messages(server: Server, web: str) -> None:
    assert len(open_images(f"{web}/a-0.tar?signature=secret")) == 2
    with pytest.raises(DataError) as error:
        open_images(web.replace("//", "//user:secret@") + "/b.tar?signature=secret")
    assert str(error.value) == f"cannot open {web}/b.tar: no such file. Check the URL."


@pytest.mark.parametrize("spec", [f"{HUB}/a-{{0..1}}.tar", f"{HUB}/*.tar", f"hf://{REPOSITORY}@v1/train/a-*.tar"])
def test_data_sets_of_the_hub_are_opened_by_name_glob_and_revision(server: Server, draw: Draw, spec: str) -> None:
    images = open_images(spec)
    assert [(sample.key, sample.image) for sample in images] == [
        (k, draw(i)) for i, k in enumerate(["0x", "0y", "1x", "1y"])
    ]
    revision = "v1" if "@" in spec else "main"
    ranges = [(path, asked) for path, asked, _ in server.requests if "/resolve/" in path]
    assert all(path.startswith(f"{REPOSITORY}/resolve/{revision}/train/a-") for path, _ in ranges)
    last = server.files["a-1.tar"].index(draw(3))
    assert ranges[-1][1] == f"bytes={last}-{last + len(draw(3)) - 1}"  # the image and nothing ahead of it


def test_token_is_sent_to_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.login = "Bearer hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(open_images(f"{HUB}/a-0.tar")) == 2


@pytest.mark.parametrize("remedy", ["netrc", "headers"])
def test_credentials_for_http_are_sent(
    server: Server, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str
) -> None:
    if remedy == "netrc":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    else:
        settings: dict[str, Any] = {}
        value = re.findall("FSSPEC_HTTP='(.*)'", remote.HTTP_LOGIN)[0]  # as the message says
        remote.fsspec.config.set_conf_env(settings, {"FSSPEC_HTTP": value})
        monkeypatch.setitem(remote.fsspec.config.conf, "http", settings["http"])
    assert len(open_images(f"{web}/a-0.tar")) == 2
    login = {"netrc": "Basic dXNlcjpzZWNyZXQ=", "headers": "Bearer TOKEN"}[remedy]
    assert {sent for _, _, sent in server.requests} == {login}


@pytest.mark.parametrize("scheme", ["http", "hf"])
def test_worker_processes_read_remote_images(server: Server, request: pytest.FixtureRequest, scheme: str) -> None:
    folder = HUB if scheme == "hf" else request.getfixturevalue("web")
    batches = OrderedBatches(open_images(f"{folder}/a-{{0..1}}.tar"), image_size=16, batch_size=1, num_workers=2)
    assert [key for batch in batches for key in batch.keys] == ["0x", "0y", "1x", "1y"]
    assert batches.skipped == {}


FAILURES = {
    401: "access is denied (HTTP 401). Write user and password to ~/.netrc, or set FSSPEC_HTTP='",
    403: "access is denied (HTTP 403). Write user and password to ~/.netrc, or set FSSPEC_HTTP='",
    404: "no such file. Check the URL.",
    410: "HTTP 410: 410, message=",
    429: "too many requests (HTTP 429), 3 times. The server limits requests: run the command again",
    500: "the server fails (HTTP 500), 3 times. Wait and run the command again: what is written is kept.",
    502: "the server fails (HTTP 502), 3 times. ",
    503: "the server fails (HTTP 503), 3 times. ",
    504: "the server fails (HTTP 504), 3 times. ",
    "no range": "this server does not support Range requests. Download the file first.",
    "reset": "the connection broke off (",
    "cut": "the connection broke off (",
    "short": "the connection broke off (10239 of 10240 bytes at byte 0), 3 times. Check the network, or wait and run",
    "stall": "the server does not answer in time, 3 times. Check the network, or wait and run the command again",
}


@pytest.mark.parametrize("fault", FAILURES, ids=str)
def test_permanent_failure_is_one_line_that_names_the_url(
    server: Server, web: str, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.2)
    server.fault = fault
    with pytest.raises(DataError) as error:
        open_images(f"{web}/a-0.tar")
    message = str(error.value)
    action = "read" if fault in ("cut", "short") else "open"
    assert message.startswith(f"cannot {action} {web}/a-0.tar: {FAILURES[fault]}")
    assert "\n" not in message
    assert (
        fault not in ("reset", "cut") or "), 3 times. Check the network, or wait and run the command again" in message
    )
    if fault != "reset":  # which aiohttp repeats itself
        assert len(server.requests) == (4 if action == "read" else 3 if ", 3 times" in message else 1)


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "reset", "cut", "short", "stall"], ids=str)
def test_failure_that_passes_is_retried(
    server: Server, web: str, monkeypatch: pytest.MonkeyPatch, draw: Draw, fault: Any
) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.2)
    server.faults = [fault, fault]
    images = open_images(f"{web}/a-0.tar")
    server.faults = [fault, fault]
    assert images[1].image == draw(1)


def test_wait_that_the_server_asks_for_is_kept(server: Server, web: str) -> None:
    server.faults = [(429, {"Retry-After": "1"})]
    start = time.monotonic()
    assert len(open_images(f"{web}/a-0.tar")) == 2
    assert time.monotonic() - start > 1
    server.faults = [(503, {"Retry-After": formatdate(time.time() + 2, usegmt=True)})]
    start = time.monotonic()
    assert len(open_images(f"{web}/a-1.tar")) == 2
    assert time.monotonic() - start > 0.9


def test_wait_longer_than_the_time_limit_is_an_error_at_once(server: Server, web: str) -> None:
    server.fault = (429, {"Retry-After": "3600"})
    with pytest.raises(DataError, match=r"HTTP 429.*The server asks to wait 3600 seconds. Then run the command again"):
        open_images(f"{web}/a-0.tar")
    assert len(server.requests) == 1


def test_stalled_server_ends_at_the_time_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library sets no time limit for listings."""
    monkeypatch.setattr(remote, "TOTAL_SECONDS", 0.5)
    server.fault = "stall"
    for spec in (f"{HUB}/a-0.tar", f"{HUB}/*.tar"):
        start = time.monotonic()
        with pytest.raises(
            DataError, match=re.escape(f"{spec}: the server does not answer in time. Check the network")
        ):
            open_images(spec)
        assert time.monotonic() - start < 3


def test_server_that_restarts_is_waited_for_while_images_are_read(
    server: Server, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(f"{web}/a-0.tar")
    attempts = []
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: attempts.append(1) or high)
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    remote.fsspec.filesystem("http").clear_instance_cache()  # and its open connections
    with pytest.raises(DataError, match=r"the connection was refused, 3 times\. Check the address"):
        images.read(0)
    with pytest.raises(DataError, match=r"the connection was refused\. Check the address"):
        open_images(f"{web}/a-1.tar")  # a wrong port is reported at once


def test_unknown_host_and_invalid_certificate_are_one_line(
    server: Server, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"the address of no-such-host\.invalid is not found\. Check the name"):
        open_images("https://no-such-host.invalid/a.tar")
    with pytest.raises(DataError, match=r"no TLS connection \(.*\)\. Check the URL and the clock; SSL_CERT_FILE names"):
        open_images(web.replace("http:", "https:") + "/a-0.tar")


def test_shard_that_changes_is_indexed_again_and_noticed_by_a_job(
    server: Server, web: str, draw: Draw, pack: Pack
) -> None:
    images = open_images(f"{web}/a-0.tar")
    count = len(server.requests)
    assert len(open_images(f"{web}/a-0.tar")) == 2
    assert len(server.requests) == count + 1  # the index is read from the cache
    server.files["a-0.tar"] = pack({"0z.png": draw(0), "0y.png": draw(1), "0z.cls": b"3"})  # of the same size
    server.modified += 10
    with pytest.raises(DataError, match=r"a-0\.tar changed after it was indexed\. Run the command again"):
        images.read(0)
    assert open_images(f"{web}/a-0.tar").key(0) == "0z"
    server.files["a-0.tar"] = pack({"new.png": draw(9)})
    with pytest.raises(DataError, match="changed after it was indexed"):
        images.read(1)


def test_mirror_with_another_etag_and_the_same_time_is_the_same_file(server: Server, web: str, draw: Draw) -> None:
    images = open_images(f"{web}/a-0.tar")
    server.mirror = "-2"
    assert images[0].image == draw(0)


def test_shard_of_the_hub_that_changes_is_indexed_again(server: Server, draw: Draw, pack: Pack) -> None:
    from huggingface_hub import HfFileSystem

    assert open_images(f"{HUB}/a-0.tar").key(0) == "0x"
    server.files[f"{REPOSITORY}/train/a-0.tar"] = pack({"0z.png": draw(0), "0y.png": draw(1), "0z.cls": b"3"})
    HfFileSystem.clear_instance_cache()  # as in a new process
    assert open_images(f"{HUB}/a-0.tar").key(0) == "0z"


HUB_FAILURES = {
    "hf://datasets/someone/absent/a.tar": "no such repository, or a private one. Check the name. Log in with `hf auth",
    f"hf://{REPOSITORY}/train/b.tar": "no such file. Check the URL.",
    f"hf://{REPOSITORY}@nosuch/train/a-0.tar": "the repository has no such revision. Check the name after @.",
    f"hf://{REPOSITORY}/train": "Name its tars: hf://datasets/someone/pictures/train/*.tar.",
    "hf://pictures": "ValueError: ",
}


@pytest.mark.parametrize("url", HUB_FAILURES)
def test_absent_files_of_the_hub_are_one_line(server: Server, url: str) -> None:
    with pytest.raises(DataError) as error:
        open_images(url)
    assert url in str(error.value)
    assert HUB_FAILURES[url] in str(error.value)
    assert "\n" not in str(error.value)


HUB_ANSWERS = {
    (403, ("X-Error-Code", "GatedRepo")): "the repository is gated. Accept its conditions on its page. Log in with",
    (401, ("X-Error-Message", "Invalid credentials in Authorization header")): "access is denied (HTTP 401). Log in",
    (403, ("X-Error-Message", "no")): "access is denied (HTTP 403). Log in with `hf auth login`, or set HF_TOKEN.",
}


@pytest.mark.parametrize("answer", HUB_ANSWERS, ids=str)
def test_denied_access_to_the_hub_is_one_line(server: Server, answer: Any) -> None:
    status, (name, value) = answer
    server.fault = (status, {name: value})
    for action, url in (("open", f"{HUB}/a-0.tar"), ("list", f"{HUB}/*.tar")):
        with pytest.raises(DataError) as error:
            open_images(url)
        assert str(error.value).startswith(f"cannot {action} {url}: {HUB_ANSWERS[answer]}")


def test_hub_without_ranges_and_without_network_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.faults = ["", ""]  # the facts and the listing
    server.fault = "no range"
    with pytest.raises(DataError, match=r"this server does not support Range requests\. Download the file first"):
        open_images(f"{HUB}/a-0.tar")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE=1 forbids it\. Unset HF_HUB_OFFLINE, or download the files"):
        open_images("hf://datasets/someone/other/*.tar")


@pytest.mark.parametrize(("scheme", "package"), sorted(remote.PACKAGES.items()))
def test_missing_package_names_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    import tomllib

    monkeypatch.setitem(sys.modules, package, None)  # the import fails
    for name in [name for name in sys.modules if name.startswith(("s3fs.", "gcsfs.", "fsspec.implementations.http"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    for action, url in (("open", f"{scheme}://bucket/x.tar"), ("list", f"{scheme}://bucket/*.tar")):
        with pytest.raises(DataError) as error:
            open_images(url)
        hint = "Install the extra: pip install 'vqpipe[remote]'."
        assert str(error.value) == f"cannot {action} {url}: the package {package} is not installed. {hint}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(
        each.startswith(package) for each in project["optional-dependencies"]["remote"] + project["dependencies"]
    )


class NoCredentialsError(Exception):
    """As botocore's."""


class DefaultCredentialsError(Exception):
    """As google.auth's."""


class HttpError(Exception):
    """As gcsfs's."""

    code = 401


def client_error(status: int, code: str) -> Exception:
    """An error of s3fs: an OSError made of botocore's."""
    cause = type("ClientError", (Exception,), {})(f"An error occurred ({code}) when calling HeadObject")
    cause.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}}
    error = {403: PermissionError, 404: FileNotFoundError}.get(status, OSError)(code)
    error.__cause__ = cause
    return error


BUCKET_FAILURES = [
    ("s3", NoCredentialsError("Unable to locate credentials"), 1, "no access (Unable to locate credentials). Set AWS_"),
    ("s3", client_error(403, "AccessDenied"), 1, "access is denied (HTTP 403). Set AWS_PROFILE, or AWS_ACCESS_KEY_ID"),
    ("s3", client_error(404, "NoSuchBucket"), 1, "no such bucket. Check the URL."),
    ("s3", client_error(404, "NoSuchKey"), 1, "no such file. Check the URL."),
    ("s3", client_error(503, "SlowDown"), 3, "the server fails (HTTP 503), 3 times. Wait and run the command again"),
    (
        "gs",
        DefaultCredentialsError("no default credentials"),
        1,
        "no access (no default credentials). Log in with `gcl",
    ),
    ("gs", HttpError("Anonymous caller, 401"), 1, "access is denied (HTTP 401). Log in with `gcloud auth application-"),
    ("gs", OSError("Forbidden: bucket/x.tar"), 1, "no access (Forbidden: bucket/x.tar). Log in with `gcloud auth app"),
    ("gs", FileNotFoundError("bucket/x.tar"), 1, "no such file or bucket. Check the URL."),
    (
        "s3",
        ConnectionResetError("Connection reset by peer"),
        3,
        "the connection broke off (Connection reset by peer), 3",
    ),
    ("s3", KeyError("size"), 1, "KeyError: 'size'. Check the URL and the network."),
]


@pytest.mark.parametrize(("scheme", "error", "attempts", "message"), BUCKET_FAILURES)
def test_failures_of_buckets_are_one_line(
    monkeypatch: pytest.MonkeyPatch, scheme: str, error: Exception, attempts: int, message: str
) -> None:
    """The file systems of buckets need packages and accounts; only their exceptions are tested."""
    calls = []

    class Bucket:
        protocol = scheme

        def info(self, path: str) -> dict[str, Any]:
            calls.append(path)
            raise error

    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(remote, "file_system", lambda url: (Bucket(), "bucket/x.tar"))
    with pytest.raises(DataError) as raised:
        open_images(f"{scheme}://bucket/x.tar")
    assert str(raised.value).startswith(f"cannot open {scheme}://bucket/x.tar: {message}")
    assert len(calls) == attempts


SCRIPT = """
import os, signal, sys
from stages import cli, signals
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images

def command():
    for number in signals.SIGNALS:
        signal.signal(number, signals.interrupt)
    images = open_images(url)
    print("opened", flush=True)
    sys.stdin.readline()
    for batch in OrderedBatches(images, image_size=16, batch_size=1, num_workers=int(workers)):
        pass

cli.app = command
while line := sys.stdin.readline():
    os.environ["HF_ENDPOINT"], url, workers, errors = line.split()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        cli.main()
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported torch, and starts a process for each line of its input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "0"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdin=-1, stdout=-1, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("workers", "number"),
    [(None, signal.SIGTERM), (0, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)],
)
def test_signal_ends_a_process_that_waits_for_a_stalled_server(
    server: Server, launcher: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, workers: int | None
) -> None:
    """While the shards are indexed (None), and while images are read by the process itself or by its workers."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    if workers is None:
        server.fault = "stall"
    launcher.stdin.write(f"{server.url} {HUB}/a-{{0..1}}.tar {workers or 0} {tmp_path / 'errors'}\n")
    launcher.stdin.flush()
    child = int(launcher.stdout.readline())
    try:
        if workers is not None:
            assert launcher.stdout.readline() == "opened\n"
            server.fault = "stall"
            launcher.stdin.write("\n")
            launcher.stdin.flush()
        assert server.stalled.wait(60)
        time.sleep(0.5)
        start = time.monotonic()
        os.kill(child, number)
        assert int(launcher.stdout.readline()) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert time.monotonic() - start < 8
        assert (tmp_path / "errors").read_text() == "interrupted; run the same command again to resume\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
            pytest.fail("a process is left")
