"""Full, failing, slow and read-only disks; names that file systems allow."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from vqpipe.artifacts import Artifact, Draft, draft, open_artifact, start, states
from vqpipe.artifacts.states import States
from vqpipe.data import sources
from vqpipe.data.images import open_images
from vqpipe.data.tars import write_tar
from vqpipe.data.tokens import read_tokens, write_token_file
from vqpipe.errors import ArtifactError, DataError, VqpipeError
from vqpipe.files import digest_json

Pack = Callable[..., bytes]
Png = Callable[[int], bytes]


def begin(out: Path, kind: str = "dataset") -> Draft:
    begun = start(out, kind, {"k": 3}, {"images": "0" * 64})
    assert isinstance(begun, Draft)
    return begun


def write(begun: Draft, name: str, action: Callable[[Path], object] = lambda path: path.write_bytes(b"x")) -> None:
    """Write one file of a draft with `action`."""
    with begun.write(name) as path:
        action(path)


def run_and_fail(out: Path, error: BaseException) -> None:
    """A run that writes one file, unless it is written already, and then raises `error`."""
    with begin(out) as begun:
        if begun.record("first") is None:
            write(begun, "first")
        raise error


def tar(path: Path) -> None:
    with write_tar(path) as writer:
        writer.write("a", b"x" * 9000, "png")


def npy(path: Path, count: int = 10_000) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(count, np.float32))


WRITERS: dict[str, Callable[[Path], object]] = {
    "tar": tar,
    "npy": npy,
    "small npy": partial(npy, count=10),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "parquet": lambda path: parquet.write_table(pa.table({"a": np.random.default_rng(0).random(9000)}), path),
    "json": lambda path: path.write_text("x" * 100_000, encoding="utf-8"),
}


@pytest.mark.parametrize(
    "kind", sorted(WRITERS.keys() - {"safetensors"})
)  # does not write through a link; see test_file_size_limit_is_named
def test_full_disk_is_one_line_with_the_free_space_and_leaves_no_torn_file(kind: str, tmp_path: Path) -> None:
    def run() -> None:
        with begin(tmp_path / "out") as begun:
            write(begun, "first")
            write(begun, "second", lambda path: (path.symlink_to("/dev/full"), WRITERS[kind](path)))

    with pytest.raises(ArtifactError) as failure:
        run()
    said = str(failure.value)
    assert said.startswith(f"cannot write {tmp_path / 'out.partial' / 'second'}: ")
    assert "MB are free" in said
    assert "run the same command again" in said
    assert failure.value.sysexit_code == 74
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} >= {"first", "request.json", "status.json"}
    assert not list(tmp_path.rglob(".writing-*"))
    with begin(tmp_path / "out") as again:
        assert again.record("first") == {}
        assert again.record("second") is None


def test_unwritable_status_file_does_not_hide_the_error(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"

    def run() -> None:
        with begin(tmp_path / "out") as begun:
            write(begun, "first")
            (partial / ".writing-0-status.json").symlink_to("/dev/full")
            raise DataError("the real error")

    with pytest.raises(DataError, match="the real error"):
        run()
    assert not (partial / "status.json").exists()
    shutil.rmtree(partial)
    draft.write_status(partial, ValueError("in a folder that is gone"))


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.parametrize(
    ("kind", "hint"), [("json", "ulimit -f"), ("npy", "free some space"), ("safetensors", "free some space")]
)
def test_file_size_limit_is_named(kind: str, hint: str, tmp_path: Path) -> None:
    def run() -> None:
        with begin(tmp_path / "out") as begun, limited(resource.RLIMIT_FSIZE, 4096):
            write(begun, "big", WRITERS[kind])

    with pytest.raises(ArtifactError, match=rf"cannot write .*big: .* MB are free.*{hint}") as failure:
        run()
    assert failure.value.sysexit_code == 74
    assert list(tmp_path.iterdir()) == []


def flaky(times: int, original: Callable[..., bytes]) -> Callable[..., bytes]:
    """`os.pread` that fails `times` times."""
    left = iter(range(times))

    def pread(*args: int) -> bytes:
        if next(left, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args)

    return pread


def test_read_errors_are_retried_and_then_name_the_file(
    tmp_path: Path, pack: Pack, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.0, 0.0))
    (tmp_path / "s.tar").write_bytes(pack({"a.png": png(0)}))
    images, read = open_images([tmp_path / "s.tar"]), os.pread
    monkeypatch.setattr(os, "pread", flaky(2, read))
    assert images.read(0) == png(0)
    monkeypatch.setattr(os, "pread", flaky(3, read))
    with pytest.raises(DataError, match=r"cannot read .*s\.tar: Input/output error") as failure:
        images.read(0)
    assert failure.value.sysexit_code == 74


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder that even root may not write to")
def test_unwritable_output_directory_is_refused_before_any_work() -> None:
    with pytest.raises(ArtifactError, match=r"cannot write /sys/vqpipe\.partial: .*Choose another --out") as failure:
        begin(Path("/sys/vqpipe"))
    assert failure.value.sysexit_code == 77


class Events:
    """Flushes and renames in order: ("fsync", path), ("rename", source, target)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.flushed)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self.renamed(getattr(os, name)))

    def flushed(self, handle: int) -> None:
        self.seen.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))

    def renamed(self, original: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Path, target: Path) -> None:
            self.seen.append(("rename", str(source), str(target)))
            original(source, target)

        return rename


def test_files_are_flushed_then_renamed_in_their_directory_then_the_directory_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    events = Events(monkeypatch)
    with begin(tmp_path / "out", "codebook") as begun:
        with begun.write("sub/a.bin") as path:
            path.write_bytes(b"a")
        begun.publish({})
    monkeypatch.setattr(states, "SHARED_BYTES", 1)
    parts = {"model": {"a": torch.zeros(1), "b": torch.ones(1)}}
    States(tmp_path / "states").save(1, parts, unchanging={"model": ["a"]})
    renames = [(number, *event[1:]) for number, event in enumerate(events.seen) if event[0] == "rename"]
    assert {Path(target).name for *_, target in renames} >= {
        *("a.bin", f"{digest_json('sub/a.bin')}.json", "manifest.json", "out", "state.json", "step-00000001"),
    }
    for number, source, target in renames:
        assert Path(source).parent == Path(target).parent
        assert ("fsync", source) in events.seen[:number]
        assert ("fsync", str(Path(target).parent)) in events.seen[number:]


def test_shards_are_not_kept_open_and_the_limit_on_open_files_is_named(tmp_path: Path, pack: Pack, png: Png) -> None:
    for number in range(60):
        (tmp_path / f"s{number:02}.tar").write_bytes(pack({f"{number}.png": png(number)}))
    open_files = len(os.listdir("/proc/self/fd"))
    with limited(resource.RLIMIT_NOFILE, open_files + 24):  # 8 threads index, each with a shard and its cached index
        images = open_images(f"{tmp_path}/s*.tar")
        assert [images.read(i) for i in range(60)] == [png(i) for i in range(60)]
    with (
        limited(resource.RLIMIT_NOFILE, 3),
        pytest.raises(DataError, match=r"s00\.tar: Too many open files") as failure,
    ):
        images.read(0)
    assert failure.value.sysexit_code == 74


@pytest.mark.parametrize("name", ["sp ace/é{1}", "-dash/a{b,c}[x]*?", "new\nline", "%s {key} $HOME ~"])
def test_paths_may_contain_spaces_braces_and_newlines(name: str, tmp_path: Path, png: Png) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    with begin(folder / "data set") as begun:
        with begun.write("shard-000000.tar") as path, write_tar(path) as writer:
            writer.write("a", png(0), "png", 0)
        artifact = begun.publish({"num_classes": 1})
    for spec in (folder / "data set", folder / "data set" / "shard-000000.tar"):
        assert open_images([spec]).read(0) == png(0)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "b {0}.png").write_bytes(png(1))
    assert open_images([folder / "pictures"])[0] == sources.Sample("b {0}", png(1), None)
    write_token_file(folder / "t.parquet", ["a"], [0], np.array([[[1, 2]]], np.uint16))
    assert read_tokens(folder / "t.parquet", 3).ids.tolist() == [[1, 2]]
    artifact.verify()
    with pytest.raises(ArtifactError) as failure:
        open_artifact(folder / "absent")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_foreign_file_or_folder_at_out_is_kept_and_named_before_images_are_hashed(what: str, tmp_path: Path) -> None:
    images: Any = type("Unread", (), {"digest": property(lambda self: pytest.fail("hashed"))})()
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine", encoding="utf-8")
    elif what == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine", encoding="utf-8")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"exists and is not an artifact of vqpipe. Choose another --out"):
        start(out, "dataset", {}, {"images": images})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert what != "file" or out.read_text(encoding="utf-8") == "mine"


def test_symbolic_link_to_an_artifact_is_followed(tmp_path: Path) -> None:
    with begin(tmp_path / "real") as begun:
        begun.publish({})
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert isinstance(start(tmp_path / "out", "dataset", {"k": 3}, {"images": "0" * 64}), Artifact)


def test_image_that_changes_during_a_run_is_an_error(tmp_path: Path, png: Png) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    images = open_images([tmp_path])
    assert images.digest
    assert images.read(1) == png(1)
    (tmp_path / "1.png").write_bytes(png(1)[:-1])
    with pytest.raises(DataError, match=r"1\.png changed during this run. Run the command again"):
        images.read(1)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*2\.png: No such file") as failure:
        images.read(2)
    assert failure.value.sysexit_code == 66


CAUSES: list[tuple[Exception, int]] = [
    (DataError("x"), 65),
    (OSError(errno.ENOENT, "x"), 66),
    (OSError(errno.EACCES, "x"), 77),
    (OSError(errno.ENOSPC, "x"), 74),
    (OSError("12 requested and 7 written"), 74),
    (RuntimeError("[gloo] Connection closed by peer"), 75),
    (ZeroDivisionError("x"), 70),
]


@pytest.mark.parametrize(("error", "cause"), CAUSES)
def test_status_holds_the_first_error_and_is_deleted_by_the_next_run(
    error: Exception, cause: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        run_and_fail(tmp_path / "out", error)
    file = tmp_path / "out.partial" / "status.json"
    said = str(error) if isinstance(error, VqpipeError) else f"{type(error).__name__}: {error}"
    first = {"error": said, "cause": cause, "rank": 0}
    assert json.loads(file.read_text(encoding="utf-8")) == first
    with monkeypatch.context() as patch:
        patch.setattr(draft.distributed, "rank", lambda: 1)
        draft.write_status(file.parent, RuntimeError("another rank has ended"))
    assert json.loads(file.read_text(encoding="utf-8")) == first
    with begin(tmp_path / "out") as begun:
        assert not file.exists()
        begun.publish({})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "manifest.json"]


def test_interrupted_run_leaves_no_status(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_and_fail(tmp_path / "out", KeyboardInterrupt())
    assert not (tmp_path / "out.partial" / "status.json").exists()
