"""Downloads from a model hub and a web server on loopback, each in a process of its own with empty caches."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from vqpipe import downloads
from vqpipe.downloads import web
from vqpipe.errors import ConfigError, WeightsError

PROGRAM = """
import sys
from vqpipe import downloads
from vqpipe.errors import VqpipeError
try:
    print(downloads.fetch(downloads.parse(sys.argv[1]), "BY HAND", sha256=sys.argv[2]))
except VqpipeError as error:
    sys.exit(f"error: {error}")
"""
SECONDS = 60
CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64
FILE = "hf:owner/name/folder/weights.pt"


@dataclass
class Fetched:
    """How a download ended."""

    path: Path
    error: str


@pytest.fixture
def fetch(hub_server: Any, hub_environment: dict[str, str]) -> Callable[..., Fetched]:
    """fetch(address, sha256, NAME=value, ...) with these environment variables."""
    hub_server.repositories["owner/name"] = {"folder/weights.pt": CONTENT}
    hub_server.files["weights.pt"] = CONTENT

    def fetch(address: str, sha256: str = "", **variables: str) -> Fetched:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, address, sha256],
            env=hub_environment | variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert "Traceback" not in done.stderr
        assert (done.returncode == 0) == ("error: " not in done.stderr)
        return Fetched(Path(done.stdout.strip()), done.stderr[done.stderr.find("error: ") :].strip())

    return fetch


def test_file_of_the_hub_is_downloaded_once(hub_server: Any, fetch: Callable[..., Fetched], tmp_path: Path) -> None:
    first = fetch(FILE, SHA256)
    assert first.path.read_bytes() == CONTENT
    assert first.path.is_relative_to(tmp_path / "hf-home" / "hub")
    assert downloads.commit_of(first.path) == "c0ffee" + "0" * 34
    requests = len(hub_server.log)
    assert fetch(FILE, SHA256).path == first.path
    assert len(hub_server.log) == requests  # the hash is enough to trust the copy
    assert fetch(FILE).path == first.path  # asks whether it is still the current one
    assert len(hub_server.bodies()) == 1


def test_revision_is_sent_to_the_hub(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    assert fetch(f"{FILE}@v1").path.read_bytes() == CONTENT
    assert all("/resolve/v1/" in line for line in hub_server.bodies())
    assert "no such revision" in fetch(f"{FILE}@v9").error


def test_interrupted_download_from_the_hub_is_resumed(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    large = CONTENT * 12
    hub_server.repositories["owner/name"]["large.pt"] = large
    hub_server.cut_at, hub_server.cuts = 11_000_000, 1
    assert fetch("hf:owner/name/large.pt").path.read_bytes() == large
    first, second = hub_server.bodies()
    assert "bytes=" not in first
    assert second.endswith(f" bytes={10 * 2**20}-")  # huggingface_hub writes 10 MiB at a time


def test_wrong_hash_from_the_hub_names_both_and_keeps_the_file(fetch: Callable[..., Fetched]) -> None:
    done = fetch(FILE, OTHER)
    assert f"has sha256 {SHA256}, not {OTHER}" in done.error
    kept = Path(done.error.split("kept as ")[1].split(";")[0])
    assert kept.read_bytes() == CONTENT
    assert "pass that path in place of the name" in done.error


def test_damaged_copy_in_the_cache_of_the_hub_is_deleted(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    path = fetch(FILE, SHA256).path
    path.write_bytes(CONTENT[:-1] + b"x")
    done = fetch(FILE, SHA256)
    assert "was damaged and has been deleted: run the command again" in done.error
    assert not path.exists()
    assert fetch(FILE, SHA256).path.read_bytes() == CONTENT


def test_gated_and_private_repositories_say_how_to_log_in(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    hub_server.gated.add("owner/name")
    assert "Accept its terms at https://huggingface.co/owner/name, then run `hf auth login`" in fetch(FILE).error
    assert fetch(FILE, HF_TOKEN="hf_loopback").path.read_bytes() == CONTENT
    hub_server.gated.clear()
    hub_server.repositories["owner/other"] = {"a.pt": CONTENT}
    hub_server.private.add("owner/other")
    done = fetch("hf:owner/other/a.pt")
    assert "has no repository owner/other, or it is private. Check the name; for a private one, run `hf" in done.error


def test_absent_repository_and_file_are_one_line(fetch: Callable[..., Fetched]) -> None:
    assert "has no repository owner/absent" in fetch("hf:owner/absent/a.pt").error
    done = fetch("hf:owner/name/absent.pt")
    assert done.error.count("\n") == 0
    assert "no such file in owner/name. See https://huggingface.co/owner/name/tree/main. BY HAND" in done.error


def test_offline_mode_uses_the_cache_and_sends_nothing(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    done = fetch(FILE, HF_HUB_OFFLINE="1")
    assert done.error == (
        f"error: {FILE} is not in the cache and cannot be downloaded: HF_HUB_OFFLINE is set. BY HAND."
    )
    assert hub_server.log == []
    path = fetch(FILE).path
    requests = len(hub_server.log)
    assert fetch(FILE, HF_HUB_OFFLINE="1").path == path
    assert "not in the cache" in fetch(f"{FILE}@v1", HF_HUB_OFFLINE="1").error  # that is another revision
    assert len(hub_server.log) == requests


def test_without_a_network_the_error_comes_within_seconds(fetch: Callable[..., Fetched]) -> None:
    done = fetch(FILE, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be downloaded: no connection to http://127.0.0.1:9. BY HAND" in done.error


def test_failing_hub_is_one_line(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    hub_server.fault = 403
    assert "HTTP status 403" in fetch(FILE).error


def test_url_is_downloaded_once(hub_server: Any, fetch: Callable[..., Fetched], tmp_path: Path) -> None:
    url = f"{hub_server.address}/files/weights.pt?secret=1"
    first = fetch(url, SHA256)
    assert first.path.read_bytes() == CONTENT
    assert first.path.is_relative_to(tmp_path / "cache" / "vqpipe" / "downloads")
    assert {path.name for path in first.path.parent.iterdir()} == {".lock", "weights.pt"}
    assert fetch(url).path == first.path
    assert len(hub_server.log) == 1


def test_interrupted_download_of_a_url_is_resumed_by_the_next_process(
    hub_server: Any, fetch: Callable[..., Fetched]
) -> None:
    url = f"{hub_server.address}/files/weights.pt"
    hub_server.cut_at = 300_000
    done = fetch(url, SHA256)
    assert (
        f"the connection ended at byte 300,000 of {len(CONTENT):,}. Run the same command again to continue"
        in done.error
    )
    hub_server.cut_at = None
    assert fetch(url, SHA256).path.read_bytes() == CONTENT
    assert hub_server.log[-1] == "GET /files/weights.pt bytes=300000-"


def test_download_that_is_interrupted_twice_is_resumed_twice(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    url = f"{hub_server.address}/files/weights.pt"
    hub_server.versioned, hub_server.modified = False, 1e9
    for hub_server.cut_at in (300_000, 600_000):
        assert f"ended at byte {hub_server.cut_at:,}" in fetch(url).error
    hub_server.cut_at = None
    assert fetch(url, SHA256).path.read_bytes() == CONTENT
    assert hub_server.log[1:] == [f"GET /files/weights.pt bytes={start}-" for start in (300_000, 600_000)]


@pytest.mark.parametrize("versioned", [True, False])
def test_partial_download_of_another_version_is_not_continued(
    hub_server: Any, fetch: Callable[..., Fetched], versioned: bool
) -> None:
    url = f"{hub_server.address}/files/weights.pt"
    hub_server.cut_at, hub_server.versioned = 300_000, versioned
    assert fetch(url).error
    hub_server.cut_at, hub_server.files["weights.pt"] = None, CONTENT[::-1]
    assert fetch(url).path.read_bytes() == CONTENT[::-1]


def test_complete_partial_download_is_kept_and_a_longer_one_begins_again(
    hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub_server.files["weights.pt"] = CONTENT
    for number, (more, requests) in enumerate(((b"", 1), (b"more", 2))):
        url = downloads.Url(f"{hub_server.address}/files/weights.pt?{number}")
        folder = downloads.url_folder(url)
        folder.mkdir(parents=True)
        (folder / "weights.pt.partial").write_bytes(CONTENT + more)
        (folder / "weights.pt.partial.json").write_text(json.dumps({"version": f'"{SHA256}"'}))
        hub_server.log.clear()
        assert downloads.fetch(url, "").read_bytes() == CONTENT
        assert len(hub_server.log) == requests


def test_two_downloads_of_a_url_at_once_are_one_and_another_query_is_another_file(
    hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = web.download

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)  # the other one arrives
        download(*arguments)

    monkeypatch.setattr(web, "download", slow)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (CONTENT, CONTENT[::-1]):
        hub_server.files["weights.pt"] = content
        url = downloads.Url(f"{hub_server.address}/files/weights.pt?id={content[0]}")
        with ThreadPoolExecutor(2) as pool:
            paths = list(pool.map(downloads.fetch, [url] * 2, [""] * 2))
        assert [path.read_bytes() for path in paths] == [content] * 2
    assert len(hub_server.log) == 2


def test_connection_that_fails_within_a_file_is_continued_by_the_next_call(
    hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub_server.files["weights.pt"] = CONTENT
    url = downloads.Url(f"{hub_server.address}/files/weights.pt")
    with monkeypatch.context() as patch:
        patch.setattr(HTTPResponse, "read", Mock(side_effect=[CONTENT[:1000], TimeoutError("timed out")]))
        with pytest.raises(WeightsError, match=r"timed out\. Run the same command again to continue"):
            downloads.fetch(url, "BY HAND")
    assert downloads.fetch(url, "BY HAND").read_bytes() == CONTENT
    assert hub_server.log[-1] == "GET /files/weights.pt bytes=1000-"


def test_file_that_does_not_fit_the_disk_is_refused(
    hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(web.shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT) - 1))
    hub_server.files["weights.pt"] = CONTENT
    with pytest.raises(WeightsError, match=r"weights\.pt needs 1\.0 MB in .*, 1\.0 MB are free\. Free some space"):
        downloads.fetch(downloads.Url(f"{hub_server.address}/files/weights.pt"), "")


def test_wrong_hash_of_a_url_keeps_the_file_aside(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    url = f"{hub_server.address}/files/weights.pt"
    done = fetch(url, OTHER)
    assert f"has sha256 {SHA256}, not {OTHER}" in done.error
    kept = Path(done.error.split("kept as ")[1].split(";")[0])
    assert kept.name == "refused-weights.pt"
    assert not kept.with_name("weights.pt").exists()


def test_web_pages_and_failures_of_a_url_are_one_line(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    hub_server.html.add("weights.pt")
    done = fetch(f"{hub_server.address}/files/weights.pt?secret=1")
    assert done.error == f"error: {hub_server.address}/files/weights.pt is a web page, not a file of weights. BY HAND."
    assert "HTTP status 404. BY HAND" in fetch(f"{hub_server.address}/files/absent.pt").error
    assert "Connection refused. BY HAND" in fetch("http://127.0.0.1:9/weights.pt").error
    error = fetch("http://user:secret@127.0.0.1/a.pt").error
    assert error == "error: http://127.0.0.1/a.pt was given with a password. Download the file, and pass its path."


def test_spaces_and_accents_in_a_url(hub_server: Any, fetch: Callable[..., Fetched]) -> None:
    hub_server.files["ü b.pt"] = CONTENT
    assert fetch(f"{hub_server.address}/files/ü b.pt").path.name == "ü_b.pt"


def test_addresses() -> None:
    assert downloads.parse("weights.pt") is None
    assert downloads.parse("hf:a/b/c/d.pt@v1") == downloads.HubFile("a/b", "c/d.pt", "v1")
    page = "https://huggingface.co/a/b/resolve/main/c%20d.pt?download=true"
    assert downloads.parse(page) == downloads.HubFile("a/b", "c d.pt")
    assert downloads.parse("https://huggingface.co/a/b/blob/v1/c.pt") == downloads.HubFile("a/b", "c.pt", "v1")
    url = downloads.parse("https://host/a/..%2F.b%20c?token=1")
    assert isinstance(url, downloads.Url)
    assert (str(url), url.path) == ("https://host/a/..%2F.b%20c", "b_c")
    assert downloads.parse("HTTPS://host:8080/a") == downloads.Url("HTTPS://host:8080/a")
    outside = "https://huggingface.co/a/b/resolve/main/../c"
    no_urls = ("https:///a", "https://[bad/a", "https://host:abc/a", "https://ho st/a")
    for wrong in ("hf:", "hf:a/b", "hf:a//c", "hf:a/b/../c", outside, outside.replace("..", "%2E%2E"), *no_urls):
        with pytest.raises(ConfigError):
            downloads.parse(wrong)


def test_version_of_a_partial_download_is_noted_beside_it(
    hub_server: Any, fetch: Callable[..., Fetched], tmp_path: Path
) -> None:
    hub_server.cut_at = 10
    assert fetch(f"{hub_server.address}/files/weights.pt").error
    (note,) = (tmp_path / "cache" / "vqpipe" / "downloads").glob("*/weights.pt.partial.json")
    assert json.loads(note.read_text()) == {"version": f'"{SHA256}"'}
