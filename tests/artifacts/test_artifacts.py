"""Artifacts: publishing, resuming, refusing, and finding damage."""

import errno
import fcntl
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqpipe.artifacts import Artifact, Draft, open_artifact, start
from vqpipe.artifacts import draft as draft_module
from vqpipe.artifacts.artifact import content_digest
from vqpipe.codebooks.codebook import load_codebook
from vqpipe.data.examples import TokenSet
from vqpipe.data.tokens import write_token_file
from vqpipe.errors import ArtifactError
from vqpipe.files import hash_file
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.progress import Silent
from vqpipe.provenance import command_again, provenance
from vqpipe.quantizers import VqConfig
from vqpipe.tokenizer import Tokenizer
from vqpipe.tokenizer_files import write_tokenizer

CONFIG = {"k": 3, "nested": {"a": 1}}
INPUTS = {"images": "0" * 64}
VERSION = metadata.version("vqpipe")


def begin(out: Path, config: dict[str, object] | None = None) -> Draft:
    draft = start(out, "codebook", CONFIG if config is None else config, INPUTS)
    assert isinstance(draft, Draft)
    return draft


def publish(out: Path) -> Artifact:
    with begin(out) as draft:
        for name in ("a.bin", "sub/b.bin"):
            with draft.write(name, rows=len(name)) as path:
                path.write_bytes(name.encode())
        return draft.publish({"k": 3})


def write_and_be_interrupted(draft: Draft, name: str) -> None:
    with draft.write(name) as path:
        path.write_bytes(b"torn")
        raise KeyboardInterrupt


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publish_leaves_one_complete_directory(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    assert set(tree(tmp_path)) == {"out/a.bin", "out/sub/b.bin", "out/manifest.json"}
    opened = open_artifact(tmp_path / "out", "codebook")
    opened.verify()
    assert opened.digest == artifact.digest
    assert opened.names("*.bin") == ["a.bin", "sub/b.bin"]
    assert opened.facts == {"k": 3}
    assert opened.lineage["inputs"]["images"]["content"] == "0" * 64


def test_request_digest_depends_on_config_and_content_digest_on_files(tmp_path: Path) -> None:
    first, again = publish(tmp_path / "x").manifest, publish(tmp_path / "y").manifest
    assert (first.request, first.content) == (again.request, again.content)
    with begin(tmp_path / "z", {"k": 4}) as draft:
        other = draft.publish({}).manifest
    assert other.request != first.request
    assert other.content != first.content
    entry = first.files["a.bin"]
    assert content_digest({"a.bin": entry}) != content_digest({"b.bin": entry})


def test_same_request_again_opens_the_published_artifact(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    before = tree(tmp_path)
    for config in (CONFIG, dict(reversed(CONFIG.items()))):
        assert isinstance(start(tmp_path / "out", "codebook", config, INPUTS), Artifact)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "inputs", "words"),
    [
        ({"files": ["a.png", "b.png"]}, {}, "other files: without b.png"),
        ({"files": ["c.png"]}, {}, "other files: a.png, not c.png"),
        ({"files": []}, {}, "other files: also a.png"),
        ({"files": ["a.png"], "k": 2}, {}, "other settings: k was not set, now 2"),
        ({"files": ["a.png"]}, {"tokenizer": "2" * 64}, "another tokenizer"),
        ({"files": ["a.png"]}, {"tokenizer": "1" * 64, "codebook": "3" * 64}, "no codebook"),
    ],
)
def test_other_files_and_inputs_are_named_as_their_reader_knows_them(
    config: dict[str, Any], inputs: dict[str, str], words: str, tmp_path: Path
) -> None:
    before = {"tokenizer": "1" * 64}
    draft = start(tmp_path / "out", "images", {"files": ["a.png"]}, before)
    assert isinstance(draft, Draft)
    with draft:
        draft.publish({})
    with pytest.raises(ArtifactError, match=rf"out exists and was made with {words}\. Choose another --out"):
        start(tmp_path / "out", "images", config, inputs or before)


def test_another_request_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"settings: nested\.a was 1, now 2"):
        start(tmp_path / "out", "codebook", {"k": 3, "nested": {"a": 2}}, INPUTS)
    with pytest.raises(ArtifactError, match=r"out exists and was made with other images\. Choose"):
        start(tmp_path / "out", "codebook", CONFIG, {"images": "1" * 64})
    with begin(tmp_path / "two") as draft, draft.write("a.bin") as path:
        path.write_bytes(b"a")
    with pytest.raises(ArtifactError, match=r"was started with other settings: k was 3, now 4"):
        start(tmp_path / "two", "codebook", {**CONFIG, "k": 4}, INPUTS)


def test_another_request_is_refused_where_only_the_last_rename_was_missing(tmp_path: Path) -> None:
    publish(tmp_path / "out").path.rename(tmp_path / "out.partial")
    with pytest.raises(ArtifactError, match=r"out\.partial exists and was made with other settings: k was 3, now 4"):
        begin(tmp_path / "out", {**CONFIG, "k": 4})
    assert isinstance(start(tmp_path / "out", "codebook", CONFIG, INPUTS), Artifact)


class Folder:
    """Images in a folder."""

    def __init__(self, digest: str, name: str = "photos") -> None:
        self.digest, self.name = digest * 64, name


@pytest.mark.parametrize("place", [(), ("data",), ("eval",)])
def test_the_tolerance_may_change_on_a_draft_and_on_a_published_artifact(
    tmp_path: Path, place: tuple[str, ...]
) -> None:
    def config(tolerance: float) -> dict[str, Any]:
        table: dict[str, Any] = {"max_skipped": tolerance, "size": 8}
        return {"k": 3, **({place[0]: table} if place else table)}

    digests = []
    for tolerance in (0.01, 0.2):
        with begin(tmp_path / "out", config(tolerance)) as draft:
            digests.append(draft.request)
            with draft.write("a.bin") as path:
                path.write_bytes(b"a")
            if tolerance == 0.2:
                assert draft.publish({}).config == config(0.2)
    assert digests[0] == digests[1]  # saved states of the first run belong to the second
    assert isinstance(start(tmp_path / "out", "codebook", config(0.5), INPUTS), Artifact)
    with pytest.raises(ArtifactError, match=r"k was 3, now 4"):
        start(tmp_path / "out", "codebook", config(0.2) | {"k": 4}, INPUTS)


def test_a_setting_of_that_name_elsewhere_is_compared(tmp_path: Path) -> None:
    with begin(tmp_path / "out", {"other": {"max_skipped": 1}}) as draft, draft.write("a.bin") as path:
        path.write_bytes(b"a")
    with pytest.raises(ArtifactError, match=r"settings: other\.max_skipped was 1, now 2"):
        begin(tmp_path / "out", {"other": {"max_skipped": 2}})


def test_other_images_are_refused_with_what_to_do(tmp_path: Path) -> None:
    out, before, after = tmp_path / "out", {"images": Folder("0")}, {"images": Folder("1")}
    changed = "other images: a file of photos was added, removed or changed since, or the place or --limit is another"
    remedy = r"\. Choose another --out, or restore those files"
    with start(out, "tokens", CONFIG, before) as draft:
        assert isinstance(draft, Draft)
        with draft.write("a.bin") as path:
            path.write_bytes(b"a")
        with pytest.raises(ArtifactError, match=rf"\.partial was started with {changed}{remedy}\.$"):
            start_unlocked(draft, out, after)
        (draft.path / "skipped.parquet").touch()  # left by a run that stopped for unusable images
        with pytest.raises(ArtifactError, match=rf"{remedy}; with those files, a larger --max-skipped finishes it"):
            start_unlocked(draft, out, after)
        draft.lock.acquire()
        draft.publish({})
    with pytest.raises(ArtifactError, match=rf"out exists and was made with {changed}{remedy}\.$"):
        start(out, "tokens", CONFIG, after)
    with pytest.raises(ArtifactError, match=r"made with other images: photos, not scans\. Choose another --out\.$"):
        start(out, "tokens", CONFIG, {"images": Folder("1", "scans")})
    with pytest.raises(ArtifactError, match=r"settings: k was 3, now 4"):
        start(out, "tokens", CONFIG | {"k": 4}, after)


def start_unlocked(draft: Draft, out: Path, inputs: dict[str, Folder]) -> None:
    draft.lock.release()
    start(out, "tokens", CONFIG, inputs)


def test_interrupted_run_resumes_at_its_first_missing_file(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as draft:
        with draft.write("a.bin", rows=5) as path:
            path.write_bytes(b"a.bin")
        with pytest.raises(KeyboardInterrupt):
            write_and_be_interrupted(draft, "sub/b.bin")
    assert not list(tmp_path.rglob(".writing-*"))
    for name in ("out", "out.partial"):
        with pytest.raises(
            ArtifactError, match=r"out is not finished\. Run its command again; vqpipe inspect .*out\.partial says"
        ):
            open_artifact(tmp_path / name)
    with begin(tmp_path / "out") as draft:
        assert draft.record("a.bin") == {"rows": 5}
        assert draft.record("sub/b.bin") is None
        os.truncate(draft.path / "a.bin", 3)
        assert draft.record("a.bin") is None
        with draft.write("a.bin", rows=5) as path:
            path.write_bytes(b"a.bin")
        with draft.write("sub/b.bin", rows=9) as path:
            path.write_bytes(b"sub/b.bin")
        resumed = draft.publish({"k": 3})
    assert resumed.digest == publish(tmp_path / "straight").digest


def test_files_of_similar_and_of_long_names_are_all_recorded(tmp_path: Path) -> None:
    names = ["a/b.bin", "a__b.bin", "c" * 240]
    with begin(tmp_path / "out") as draft:
        for name in names:
            with draft.write(name, own=name) as path:
                path.write_bytes(name.encode())
        assert [draft.record(name) for name in names] == [{"own": name} for name in names]
        draft.publish({}).verify()
    assert {"out/" + name for name in names} < set(tree(tmp_path))


def test_run_that_fails_before_its_first_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_files_without_a_record_are_not_published(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as draft:
        (draft.path / "checkpoints" / "step-1").mkdir(parents=True)
        (draft.path / "checkpoints" / "step-1" / "model").write_bytes(b"x")
        (draft.path / "log.jsonl").write_text("{}\n")
        draft.record_existing("log.jsonl")
        draft.publish({})
    assert set(tree(tmp_path)) == {"out/log.jsonl", "out/manifest.json"}
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_second_writer_is_refused(tmp_path: Path, python: Any) -> None:
    program = "import sys; from vqpipe.artifacts import start; start(sys.argv[1], 'codebook', {'k': 3}, {})"
    with begin(tmp_path / "out", {"k": 3}):
        second = python(program, str(tmp_path / "out"))
    assert second.returncode == 1
    assert f"is being written by process {os.getpid()}" in second.stderr


def test_lock_is_held_until_after_the_publishing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moments = os.rename, []

    def is_locked(folder: Path) -> bool:
        other = os.open(folder / ".lock", os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(other)
        return False

    def observed(source: Path, target: Path) -> None:
        moments.append(is_locked(source))
        rename(source, target)
        moments.append(is_locked(target))

    monkeypatch.setattr(os, "rename", observed)
    publish(tmp_path / "out")
    assert moments == [True, True]
    assert not list(tmp_path.rglob(".lock"))


def test_lock_left_after_publishing_is_deleted_by_the_next_run(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    (tmp_path / "out" / ".lock").write_text("process 1 on nowhere\n")
    assert isinstance(start(tmp_path / "out", "codebook", CONFIG, INPUTS), Artifact)
    assert not list(tmp_path.rglob(".lock"))


def test_damaged_or_missing_files_are_detected(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    (artifact.path / "a.bin").write_bytes(b"A.bin")
    with pytest.raises(ArtifactError, match=r"a\.bin is damaged"):
        open_artifact(artifact.path).verify()
    manifest = artifact.path / "manifest.json"
    edited = json.loads(manifest.read_text())
    edited["files"]["a.bin"]["sha256"] = hash_file(artifact.path / "a.bin")
    manifest.write_text(json.dumps(edited))
    with pytest.raises(ArtifactError, match=r"manifest\.json was edited: its content digest does not match"):
        open_artifact(artifact.path).verify()
    (artifact.path / "a.bin").write_bytes(b"longer")
    with pytest.raises(ArtifactError, match="has 6 bytes, published with 5"):
        open_artifact(artifact.path)
    (artifact.path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        open_artifact(artifact.path)


def test_check_hashes_the_named_files_and_reports_progress(tmp_path: Path) -> None:
    counted: list[int] = []

    class Counter(Silent):
        def advance(self, count: int = 1) -> None:
            counted.append(count)

    artifact = publish(tmp_path / "out")
    artifact.verify_files(["a.bin", "sub/b.bin"], Counter())
    assert counted == [1, 1]
    (artifact.path / "sub" / "b.bin").write_bytes(b"sub/B.bin")
    artifact.verify_files(["a.bin"])
    with pytest.raises(ArtifactError, match=r"b\.bin is damaged: sha256 \w{12}, published as \w{12}"):
        artifact.verify_files(["a.bin", "sub/b.bin"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_by_whoever_may_list_the_directory(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with begin(tmp_path / "out") as draft:
            with draft.write("sub/weights.safetensors") as path:
                save_file({"a": torch.zeros(1)}, path)  # which lets only its owner read it
            (draft.path / "log").write_text("")
            (draft.path / "log").chmod(0o600)
            draft.record_existing("log")
            artifact = draft.publish({})
    finally:
        os.umask(before)
    assert {artifact.file(name).stat().st_mode & 0o777 for name in artifact.names()} == {mode}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, f"has schema 0, this vqpipe reads 1. Use the vqpipe that made it: {VERSION}"),
        ({"schema": 2}, f"has schema 2, this vqpipe reads 1. Use the vqpipe that made it: {VERSION}"),
        ({"schema": "1"}, f"has schema 1, this vqpipe reads 1. Use the vqpipe that made it: {VERSION}"),
        ({"kind": "other"}, "is damaged"),
        ({"files": {"../evil": {"bytes": 1, "sha256": "0"}}}, "is not a valid file name"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "is not a valid file name"),
        ({"files": {"a.bin": 3}}, "is damaged"),
        ({"provenance": {"command": "abc"}}, "is damaged"),
        ({"provenance": {"command": [1]}}, "is damaged"),
        ({"provenance": {"lineage": [1]}}, "is damaged"),
        ({"provenance": {"lineage": {"images": {"kind": "data"}}}}, "is damaged"),
    ],
)
def test_manifest_that_is_invalid_or_of_another_schema_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = publish(tmp_path / "out").path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path / "out")


def test_truncated_manifest_and_wrong_kind_are_refused(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"is of kind codebook, tokenizer is needed\. Pass what vqpipe train or "):
        open_artifact(artifact.path, "tokenizer")
    file = artifact.path / "manifest.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(artifact.path)
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        open_artifact(tmp_path / "absent")


def test_unreadable_manifest_is_a_permission_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path / "out").path

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)  # root may read whatever its mode is
    with pytest.raises(ArtifactError, match=r"cannot read .*manifest\.json: Permission denied. Check its permissions"):
        open_artifact(path)


def test_current_directory_can_be_opened_as_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(publish(tmp_path / "out").path / "sub")
    assert open_artifact("..").name == "out"
    with pytest.raises(ArtifactError, match="sub is not a vqpipe artifact"):
        open_artifact(".")


def test_artifact_as_input_adds_its_lineage(tmp_path: Path) -> None:
    first = publish(tmp_path / "first")
    draft = start(tmp_path / "second", "tokenizer", {}, {"codebook": first})
    assert isinstance(draft, Draft)
    with draft:
        second = draft.publish({})
    assert second.inputs == {"codebook": first.digest}
    assert second.lineage["inputs"]["codebook"]["name"] == "first"
    assert second.lineage["inputs"]["codebook"]["inputs"]["images"]["content"] == "0" * 64


# What is loaded from artifacts.


def publish_files(out: Path, kind: str, write: Callable[[Draft], None], facts: dict[str, Any]) -> Artifact:
    begun = start(out, kind, {}, {"images": "0" * 64})
    assert isinstance(begun, Draft)
    with begun:
        write(begun)
        return begun.publish(facts)


def flip(path: Path, byte: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))


def codebook(begun: Draft) -> None:
    with begun.write("codebook.safetensors") as path:
        save_file({"codebook": torch.eye(4, 3), "counts": torch.ones(4, dtype=torch.int64)}, path)


def tokens(begun: Draft) -> None:
    with begun.write("tokens-00000.parquet") as path:
        write_token_file(path, ["a"], [0], np.array([[[1, 2]]], np.uint16))


def tokenizer(begun: Draft) -> None:
    small = {"base_channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    model = VqganConfig(**small, z_channels=4, quantizer=VqConfig(codebook_size=4, code_dim=2))
    write_tokenizer(begun, build_autoencoder(model), 8)


LOADS: dict[str, tuple[Callable[[Draft], None], str, Callable[[Artifact], object]]] = {
    "codebook": (codebook, "codebook.safetensors", load_codebook),
    "tokenizer": (tokenizer, "model.safetensors", lambda artifact: Tokenizer.from_pretrained(artifact.path)),
    "tokens": (tokens, "tokens-00000.parquet", TokenSet),
}


@pytest.mark.parametrize("kind", LOADS)
def test_flipped_bit_is_detected_on_load(kind: str, tmp_path: Path) -> None:
    write, name, load = LOADS[kind]
    artifact = publish_files(tmp_path / "out", kind, write, {"codebook_size": 9, "num_images": 1, "num_tokens": 2})
    load(artifact)
    flip(artifact.path / name, 60 if kind == "tokens" else -5)
    again = open_artifact(artifact.path)  # sizes alone do not show it
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: sha256 \w{{12}}, published as \w{{12}}"):
        load(again)


def test_unknown_manifest_keys_are_ignored_within_a_schema(tmp_path: Path) -> None:
    file = publish(tmp_path / "out").path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": [1]}))
    assert open_artifact(tmp_path / "out").facts == {"k": 3}


def test_resuming_in_another_environment_warns_and_records_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(version: str, threads: int, stop: bool) -> Artifact | None:
        here = {"versions": {"vqpipe": version}, "hardware": {"threads": threads}, "world_size": 1}
        monkeypatch.setattr(draft_module, "environment", lambda world_size: here)
        begun = start(tmp_path / "out", "codebook", {}, {"images": "0" * 64})
        assert isinstance(begun, Draft)
        with begun:
            if begun.record("codebook.safetensors") is None:
                codebook(begun)
            return None if stop else begun.publish({})

    with caplog.at_level(logging.WARNING, logger="vqpipe"):
        run("1", 2, stop=True)
        run("1", 2, stop=True)
        assert caplog.messages == []
        run("1", 4, stop=True)
        artifact = run("2", 4, stop=False)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "hardware.threads was 2, now 4; the manifest will list both",
        'versions.vqpipe was "1", now "2"; the manifest will list both',
    ]
    assert artifact is not None
    runs = artifact.manifest.provenance["runs"]
    assert [(run["versions"]["vqpipe"], run["hardware"]["threads"]) for run in runs] == [("1", 2), ("1", 4), ("2", 4)]
    assert artifact.digest == publish_files(tmp_path / "straight", "codebook", codebook, {}).digest


def test_file_behind_a_symbolic_link_is_missing(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    (artifact.path / "sub").rename(tmp_path / "elsewhere")
    (artifact.path / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"sub/b\.bin is missing"):
        open_artifact(artifact.path)


def test_recorded_commands_have_no_passwords_and_queries_of_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "https://user:secret@host/a.tar?signature=secret",
        "s3://key:secret@bucket/a-?.tar",
        "hf://name@main/a.tar",
    ]
    shown = ["https://host/a.tar", "s3://bucket/a-?.tar", "hf://name@main/a.tar"]
    monkeypatch.setattr(sys, "argv", ["/bin/vqpipe", "eval", *words, "--out", "report"])
    assert provenance(1)["command"] == ["vqpipe", "eval", *shown, "--out", "report"]
    assert shlex.split(command_again()) == ["vqpipe", "eval", *shown, "--out", "DIR"]


def test_a_similar_name_in_the_same_folder_is_proposed(tmp_path: Path) -> None:
    publish(tmp_path / "photos")
    with pytest.raises(ArtifactError, match=r"there is no such folder\. Did you mean .*photos\?"):
        open_artifact(tmp_path / "photo")
    with pytest.raises(ArtifactError, match=r"there is no such folder\. Check the path"):
        open_artifact(tmp_path / "elsewhere" / "photo")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json\. Pass its folder, .*photos"):
        open_artifact(tmp_path / "photos" / "manifest.json")


def test_unfinished_artifact_names_the_command_that_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/vqpipe", "train", "--images", "my photos"])
    with begin(tmp_path / "out") as draft, draft.write("a.bin") as path:
        path.write_bytes(b"a")
    with pytest.raises(
        ArtifactError, match=r"out is not finished\. Finish it with: vqpipe train --images 'my photos'; "
    ):
        open_artifact(tmp_path / "out")
