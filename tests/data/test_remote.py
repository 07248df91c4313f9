"""Remote images against a server on this machine that fails in every way: the message of each failure, what is retried,
and that a signal ends a process that waits for a stalled server."""

import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqpipe.data import parquets, remote
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet, open_images
from vqpipe.errors import DataError

Draw = Callable[..., bytes]
Pack = Callable[..., bytes]
REPOSITORY = "datasets/someone/pictures"
ROOT = Path(__file__).resolve().parents[2]


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture
def server(hub_in_process: Any, draw: Draw, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/hub_server.py with two shards of two images, `/files/a-0.tar` and `/files/a-1.tar`, also as a data set of
    the hub."""
    server = hub_in_process
    server.modified, train = 1e9, dict[str, bytes]()
    for number in range(2):
        members = {f"{number}{key}.png": draw(2 * number + i) for i, key in enumerate("xy")} | {f"{number}x.cls": b"3"}
        server.files[f"a-{number}.tar"] = train[f"train/a-{number}.tar"] = pack(members)
    server.repositories[REPOSITORY] = train
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "TOTAL_SECONDS", 5.0)
    return server


@pytest.fixture
def web(server: Any) -> str:
    """The URL of its files, for a test of http:// URLs."""
    pytest.importorskip("aiohttp", reason="http:// needs the extra remote")
    return f"{server.address}/files"


HUB = f"hf://{REPOSITORY}/train"


def contents(images: ImageSet) -> list[tuple[str, int | None, int]]:
    return [(sample.key, sample.label, len(sample.image)) for sample in images]


def test_http_shards_are_indexed_and_read_by_range(server: Any, web: str, draw: Draw) -> None:
    images = open_images(f"{web}/a-{{0..1}}.tar")
    assert [images[i].image for i in range(4)] == [draw(i) for i in range(4)]
    assert [sample.key for sample in images] == ["0x", "0y", "1x", "1y"]
    assert images.label(0) == 3
    assert all(asked.startswith("bytes=") for _, asked, _ in server.requests)
    restored = pickle.loads(pickle.dumps(images))
    assert contents(restored) == contents(images)


def test_links_of_a_page_match_a_glob(server: Any, web: str) -> None:
    server.files["list"] = b'<a href="a-0.tar">a-0.tar</a> <a href="other.txt">other</a>'
    server.html.add("list")
    server.files["list/a-0.tar"] = server.files["a-0.tar"]
    assert [sample.key for sample in open_images(f"{web}/list/*.tar")] == ["0x", "0y"]
    with pytest.raises(DataError, match=r"no links that match\. Write the names as \{000000\.\.000099\}"):
        open_images(f"{web}/list/b-*.tar")


def test_query_of_a_signed_link_is_no_glob_and_stays_out_of_messages(server: Any, web: str) -> None:
    assert len(open_images(f"{web}/a-0.tar?signature=secret")) == 2
    with pytest.raises(DataError) as error:
        open_images(web.replace("//", "//user:secret@") + "/b.tar?signature=secret")
    assert str(error.value) == f"cannot open {web}/b.tar: no such file. Check the URL."


@pytest.mark.parametrize("spec", [f"{HUB}/a-{{0..1}}.tar", f"{HUB}/*.tar", f"hf://{REPOSITORY}@v1/train/a-*.tar"])
def test_data_sets_of_the_hub_are_opened_by_name_glob_and_revision(server: Any, draw: Draw, spec: str) -> None:
    images = open_images(spec)
    assert [(sample.key, sample.image) for sample in images] == [
        (k, draw(i)) for i, k in enumerate(["0x", "0y", "1x", "1y"])
    ]
    revision = "v1" if "@" in spec else "main"
    ranges = [(path, asked) for path, asked, _ in server.requests if "/resolve/" in path]
    assert all(path.startswith(f"{REPOSITORY}/resolve/{revision}/train/a-") for path, _ in ranges)
    last = server.files["a-1.tar"].index(draw(3))
    assert ranges[-1][1] == f"bytes={last}-{last + len(draw(3)) - 1}"  # the image and nothing ahead of it


def test_token_is_sent_to_the_hub(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.private.add(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", sys.modules["hub_server"].TOKEN)
    assert len(open_images(f"{HUB}/a-0.tar")) == 2


@pytest.mark.parametrize("remedy", ["netrc", "headers"])
def test_credentials_for_http_are_sent(
    server: Any, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str
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
def test_worker_processes_read_remote_images(server: Any, request: pytest.FixtureRequest, scheme: str) -> None:
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
    "short": "the connection broke off (20479 of 20480 bytes at byte 0), 3 times. Check the network, or wait and run",
    "stall": "the server does not answer in time, 3 times. Check the network, or wait and run the command again",
}


@pytest.mark.parametrize("fault", FAILURES, ids=str)
def test_permanent_failure_is_one_line_that_names_the_url(
    server: Any, web: str, monkeypatch: pytest.MonkeyPatch, fault: Any
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
    server: Any, web: str, monkeypatch: pytest.MonkeyPatch, draw: Draw, fault: Any
) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.2)
    server.faults = [fault, fault]
    images = open_images(f"{web}/a-0.tar")
    server.faults = [fault, fault]
    assert images[1].image == draw(1)


def test_wait_that_the_server_asks_for_is_kept(server: Any, web: str) -> None:
    server.faults = [(429, {"Retry-After": "1"})]
    start = time.monotonic()
    assert len(open_images(f"{web}/a-0.tar")) == 2
    assert time.monotonic() - start > 1
    server.faults = [(503, {"Retry-After": formatdate(time.time() + 2, usegmt=True)})]
    start = time.monotonic()
    assert len(open_images(f"{web}/a-1.tar")) == 2
    assert time.monotonic() - start > 0.9


def test_wait_longer_than_the_time_limit_is_an_error_at_once(server: Any, web: str) -> None:
    server.fault = (429, {"Retry-After": "3600"})
    with pytest.raises(DataError, match=r"HTTP 429.*The server asks to wait 3600 seconds. Then run the command again"):
        open_images(f"{web}/a-0.tar")
    assert len(server.requests) == 1


def test_stalled_server_ends_at_the_time_limit(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    server: Any, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(f"{web}/a-0.tar")
    attempts = []
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: attempts.append(1) or high)
    server.stop()
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    remote.fsspec.filesystem("http").clear_instance_cache()  # and its open connections
    with pytest.raises(DataError, match=r"the connection was refused, 3 times\. Check the address"):
        images.read(0)
    with pytest.raises(DataError, match=r"the connection was refused\. Check the address"):
        open_images(f"{web}/a-1.tar")  # a wrong port is reported at once


def test_unknown_host_and_invalid_certificate_are_one_line(
    server: Any, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"the address of no-such-host\.invalid is not found\. Check the name"):
        open_images("https://no-such-host.invalid/a.tar")
    with pytest.raises(DataError, match=r"no TLS connection \(.*\)\. Check the URL and the clock; SSL_CERT_FILE names"):
        open_images(web.replace("http:", "https:") + "/a-0.tar")


def test_shard_that_changes_is_indexed_again_and_noticed_by_a_job(
    server: Any, web: str, draw: Draw, pack: Pack
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


def test_passwords_and_queries_of_urls_are_in_no_name_message_or_cache(
    server: Any, web: str, draw: Draw, pack: Pack, tmp_path: Path
) -> None:
    write_zip(tmp_path / "b.zip", {"b.png": draw(1)})
    pq.write_table(pa.table({"image": [draw(2)]}), tmp_path / "c.parquet")
    server.files |= {name: (tmp_path / name).read_bytes() for name in ("b.zip", "c.parquet")}
    server.files |= dict.fromkeys(("d.tar", "e.zip", "f.parquet"), b"damaged" * 200)
    signed = web.replace("//", "//user:secret@") + "/{}?signature=secret.x"
    images = open_images([signed.format(name) for name in ("a-0.tar", "b.zip", "c.parquet")])
    assert images.name == "a-0.tar + b.zip + c.parquet"
    assert [images.origin(i) for i in range(4)] == [("a-0.tar", 0), ("a-0.tar", 1), ("b.zip", 0), ("c.parquet", 0)]
    assert [sample.key for sample in images] == ["0x", "0y", "b", "c/0"]
    assert [images[i].image for i in range(4)] == [draw(0), draw(1), draw(1), draw(2)]
    cached = list((tmp_path / "cache").rglob("*.json"))
    assert len(cached) == 3
    assert not any(b"secret" in path.read_bytes() for path in cached)
    for name in ("d.tar", "e.zip", "f.parquet", "g.png", "h.tar"):
        with pytest.raises(DataError, match=name) as raised:
            open_images(signed.format(name))
        assert "secret" not in str(raised.value)
    server.files["a-0.tar"] = pack({})
    with pytest.raises(DataError, match=r"/files/a-0\.tar changed") as raised:
        images.read(0)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "memory://bucket/folder is a folder. Name its tars: memory://bucket/folder/*.tar."),
        ("no*.tar", "no such images: memory://bucket/no*.tar. "),
    ],
)
def test_passwords_of_other_file_systems_are_in_no_message(name: str, message: str) -> None:
    remote.fsspec.filesystem("memory").makedirs("/user:secret@bucket/folder", exist_ok=True)
    with pytest.raises(DataError, match=re.escape(message)):
        open_images(f"memory://user:secret@bucket/{name}")


def test_image_of_a_remote_zip_is_one_request_that_notices_a_change(
    server: Any, web: str, draw: Draw, tmp_path: Path
) -> None:
    for name, numbers in (("a", "01"), ("b", "10")):
        write_zip(tmp_path / f"{name}.zip", {f"{i}.png": draw(int(number)) for i, number in enumerate(numbers)})
    server.files["a.zip"] = (tmp_path / "a.zip").read_bytes()
    images = open_images(f"{web}/a.zip")
    server.requests.clear()
    assert [sample.image for sample in images] == [draw(0), draw(1)]
    assert len(server.requests) == 2
    server.files["a.zip"], server.modified = (tmp_path / "b.zip").read_bytes(), 2e9
    with pytest.raises(DataError, match=r"a\.zip changed after it was indexed"):
        images.read(0)


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_change_behind_a_file_system_without_validated_reads_is_noticed(
    draw: Draw, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is looked for at the first read of a process, and CHECK_SECONDS later."""
    write_zip(tmp_path / "a.zip", {"0.png": draw(0)})
    pq.write_table(pa.table({"image": [draw(0)]}), tmp_path / "a.parquet")
    (tmp_path / "a.tar").write_bytes(pack({"0.png": draw(0)}))
    data, system = (tmp_path / f"a.{kind}").read_bytes(), remote.fsspec.filesystem("memory")
    asked = list[str]()
    describe = remote.describe
    monkeypatch.setattr(remote, "describe", lambda url, seconds: (asked.append(url), describe(url, seconds))[1])
    monkeypatch.setattr(remote, "checked", {})
    system.pipe(f"/changed/a.{kind}", data)
    images = open_images(f"memory://changed/a.{kind}")
    remote.checked.clear()  # a new process
    asked.clear()
    assert [images.read(0), images.read(0)] == [draw(0), draw(0)]
    assert len(asked) == 1
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.0)
    parquets.read_group.cache_clear()
    assert images.read(0) == draw(0)
    system.pipe(f"/changed/a.{kind}", data)
    parquets.read_group.cache_clear()
    with pytest.raises(DataError, match=rf"memory://changed/a\.{kind} changed after it was indexed"):
        images.read(0)


def test_mirror_with_another_etag_and_the_same_time_is_the_same_file(server: Any, web: str, draw: Draw) -> None:
    images = open_images(f"{web}/a-0.tar")
    server.mirror = "-2"
    assert images[0].image == draw(0)


def test_shard_of_the_hub_that_changes_is_indexed_again(server: Any, draw: Draw, pack: Pack) -> None:
    from huggingface_hub import HfFileSystem

    assert open_images(f"{HUB}/a-0.tar").key(0) == "0x"
    server.repositories[REPOSITORY]["train/a-0.tar"] = pack({"0z.png": draw(0), "0y.png": draw(1), "0z.cls": b"3"})
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
def test_absent_files_of_the_hub_are_one_line(server: Any, url: str) -> None:
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
def test_denied_access_to_the_hub_is_one_line(server: Any, answer: Any) -> None:
    status, (name, value) = answer
    server.fault = (status, {name: value})
    for action, url in (("open", f"{HUB}/a-0.tar"), ("list", f"{HUB}/*.tar")):
        with pytest.raises(DataError) as error:
            open_images(url)
        assert str(error.value).startswith(f"cannot {action} {url}: {HUB_ANSWERS[answer]}")


def test_hub_without_ranges_and_without_network_is_one_line(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(remote, "BLOCK", 1024)  # a request of the whole file would be answered
    server.faults = ["", ""]  # the facts and the listing
    server.fault = "no range"
    with pytest.raises(DataError, match=r"this server does not support Range requests\. Download the file first"):
        open_images(f"{HUB}/a-0.tar")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE=1 forbids it\. Unset HF_HUB_OFFLINE, or download the files"):
        open_images("hf://datasets/someone/other/*.tar")


def test_a_package_that_is_installed_and_fails_is_not_to_be_installed() -> None:
    what, hint, _ = remote.explain("s3://bucket/x.tar", ImportError("no name 'x' in numpy", name="numpy"))
    assert (what, hint) == (
        "the package numpy is installed, but cannot be imported (no name 'x' in numpy)",
        "Repair it",
    )


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
from vqpipe.data import remote
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images

remote.SILENT_SECONDS = 300.0

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
    [
        (None, signal.SIGTERM),
        (2, signal.SIGINT),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, signal.SIGINT), (2, signal.SIGTERM))),
    ],
)
def test_signal_ends_a_process_that_waits_for_a_stalled_server(
    server: Any, launcher: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, workers: int | None
) -> None:
    """While the shards are indexed (None), and while images are read by the process itself or by its workers."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    if workers is None:
        server.fault = "stall"
    launcher.stdin.write(f"{server.address} {HUB}/a-{{0..1}}.tar {workers or 0} {tmp_path / 'errors'}\n")
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
        assert time.monotonic() - start < 250  # less than a stalled server is waited for here
        assert (tmp_path / "errors").read_text() == "interrupted; the same command again resumes from what is written\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
            pytest.fail("a process is left")
