import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqpipe.artifacts import Artifact, Draft, open_artifact, start
from vqpipe.artifacts import draft as draft_module
from vqpipe.errors import ArtifactError

CONFIG = {"k": 3, "nested": {"a": 1}}
INPUTS = {"images": "0" * 64}


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


def test_publishing_leaves_one_whole_directory(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    assert set(tree(tmp_path)) == {"out/a.bin", "out/sub/b.bin", "out/manifest.json"}
    opened = open_artifact(tmp_path / "out", "codebook")
    opened.verify()
    assert opened.content == artifact.content
    assert opened.names("*.bin") == ["a.bin", "sub/b.bin"]
    assert opened.facts == {"k": 3}
    assert opened.lineage["inputs"]["images"]["content"] == "0" * 64


def test_the_two_digests_depend_on_what_they_should(tmp_path: Path) -> None:
    first, again = publish(tmp_path / "x").manifest, publish(tmp_path / "y").manifest
    assert (first.request, first.content) == (again.request, again.content)
    with begin(tmp_path / "z", {"k": 4}) as draft:
        other = draft.publish({}).manifest
    assert other.request != first.request
    assert other.content != first.content


def test_the_same_request_again_is_the_published_artifact(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    before = tree(tmp_path)
    assert isinstance(start(tmp_path / "out", "codebook", CONFIG, INPUTS), Artifact)
    assert tree(tmp_path) == before


def test_another_request_names_the_first_difference(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"config\.nested\.a was 1, now 2"):
        start(tmp_path / "out", "codebook", {"k": 3, "nested": {"a": 2}}, INPUTS)
    with pytest.raises(ArtifactError, match=r"inputs\.images was"):
        start(tmp_path / "out", "codebook", CONFIG, {"images": "1" * 64})
    with begin(tmp_path / "two") as draft, draft.write("a.bin") as path:
        path.write_bytes(b"a")
    with pytest.raises(ArtifactError, match=r"was begun with other settings: config\.k was 3, now 4"):
        start(tmp_path / "two", "codebook", {**CONFIG, "k": 4}, INPUTS)


def test_a_cut_run_resumes_at_its_first_missing_file(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as draft:
        with draft.write("a.bin", rows=5) as path:
            path.write_bytes(b"a.bin")
        with pytest.raises(KeyboardInterrupt):
            write_and_be_interrupted(draft, "sub/b.bin")
    assert not list(tmp_path.rglob(".writing-*"))
    with pytest.raises(ArtifactError, match="is not finished: 1 files so far"):
        open_artifact(tmp_path / "out")
    with begin(tmp_path / "out") as draft:
        assert draft.record("a.bin") == {"rows": 5}
        assert draft.record("sub/b.bin") is None
        with draft.write("sub/b.bin", rows=9) as path:
            path.write_bytes(b"sub/b.bin")
        resumed = draft.publish({"k": 3})
    assert resumed.content == publish(tmp_path / "straight").content


def test_a_run_that_fails_before_its_first_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_unrecorded_files_are_not_published(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as draft:
        (draft.path / "checkpoints" / "step-1").mkdir(parents=True)
        (draft.path / "checkpoints" / "step-1" / "model").write_bytes(b"x")
        (draft.path / "log.jsonl").write_text("{}\n")
        draft.adopt("log.jsonl")
        draft.publish({})
    assert set(tree(tmp_path)) == {"out/log.jsonl", "out/manifest.json"}
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_writers_cannot_both_write(tmp_path: Path) -> None:
    program = "import sys; from vqpipe.artifacts import start; start(sys.argv[1], 'codebook', {'k': 3}, {})"
    with begin(tmp_path / "out", {"k": 3}):
        second = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True)
    assert second.returncode == 1
    assert f"is being written by process {os.getpid()}" in second.stderr


@pytest.mark.parametrize("moment", ["rename", "renamed"])
def test_nobody_comes_between_the_last_file_and_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    answers = []

    def fault(name: str) -> None:
        if name == moment:
            other = os.open(folder / ".lock", os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(other)
            answers.append(name)

    folder = tmp_path / ("out.partial" if moment == "rename" else "out")
    monkeypatch.setattr(draft_module, "fault", fault)
    publish(tmp_path / "out")
    assert answers == [moment]
    assert not list(tmp_path.rglob(".lock"))


def test_a_lock_that_was_left_just_after_publishing_goes_with_the_next_run(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    (tmp_path / "out" / ".lock").write_text("process 1 on nowhere\n")
    assert isinstance(start(tmp_path / "out", "codebook", CONFIG, INPUTS), Artifact)
    assert not list(tmp_path.rglob(".lock"))


def test_damage_is_found(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    (artifact.path / "a.bin").write_bytes(b"A.bin")
    with pytest.raises(ArtifactError, match=r"a\.bin is damaged"):
        open_artifact(artifact.path).verify()
    (artifact.path / "a.bin").write_bytes(b"longer")
    with pytest.raises(ArtifactError, match="has 6 bytes, published with 5"):
        open_artifact(artifact.path)
    (artifact.path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        open_artifact(artifact.path)


def test_files_can_be_checked_one_by_one(tmp_path: Path) -> None:
    artifact, heard = publish(tmp_path / "out"), list[str]()
    artifact.check(["a.bin", "sub/b.bin"], heard.append)
    assert heard == ["a.bin", "sub/b.bin"]
    (artifact.path / "sub" / "b.bin").write_bytes(b"sub/B.bin")
    artifact.check(["a.bin"])
    with pytest.raises(ArtifactError, match=r"b\.bin is damaged: sha256 \w{12}, published as \w{12}"):
        artifact.check(["a.bin", "sub/b.bin"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_those_who_may_list_an_artifact_may_read_its_files(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with begin(tmp_path / "out") as draft:
            with draft.write("sub/weights.safetensors") as path:
                save_file({"a": torch.zeros(1)}, path)  # which lets only its owner read it
            (draft.path / "log").write_text("")
            (draft.path / "log").chmod(0o600)
            draft.adopt("log")
            artifact = draft.publish({})
    finally:
        os.umask(before)
    assert {artifact.file(name).stat().st_mode & 0o777 for name in artifact.names()} == {mode}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"kind": "other"}, "is damaged"),
        ({"files": {"../evil": {"bytes": 1, "sha256": "0"}}}, "is not a file name"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "is not a file name"),
        ({"files": {"a.bin": 3}}, "is damaged"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = publish(tmp_path / "out").path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path / "out")


def test_a_manifest_cut_short_or_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out")
    with pytest.raises(ArtifactError, match="is of kind codebook, tokenizer is needed"):
        open_artifact(artifact.path, "tokenizer")
    file = artifact.path / "manifest.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(artifact.path)
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        open_artifact(tmp_path / "absent")


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path / "out").path

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)  # root may read whatever its mode is
    with pytest.raises(ArtifactError, match=r"cannot read .*manifest\.json: Permission denied. Check its permissions"):
        open_artifact(path)


def test_the_current_folder_may_be_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(publish(tmp_path / "out").path / "sub")
    assert open_artifact("..").name == "out"
    with pytest.raises(ArtifactError, match="sub is not a vqpipe artifact"):
        open_artifact(".")


def test_an_artifact_is_an_input_with_a_lineage(tmp_path: Path) -> None:
    first = publish(tmp_path / "first")
    draft = start(tmp_path / "second", "tokenizer", {}, {"codebook": first})
    assert isinstance(draft, Draft)
    with draft:
        second = draft.publish({})
    assert second.inputs == {"codebook": first.content}
    assert second.lineage["inputs"]["codebook"]["name"] == "first"
    assert second.lineage["inputs"]["codebook"]["inputs"]["images"]["content"] == "0" * 64
