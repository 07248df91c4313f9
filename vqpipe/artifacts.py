"""Finished directories: what one stage hands to the next.

A stage writes into `<out>.partial/`, file by file, each hashed, flushed to disk and renamed. Publishing writes
`manifest.json` last and renames the whole directory to `<out>`. So a directory without the suffix is whole, it is never
overwritten, and a run that was cut short resumes at its first missing file when the same command is given again.

    <out>.partial/  request.json   what was asked          .records/  one JSON per finished file
                    .lock          held by the one writer   ...        the files themselves
    <out>/          manifest.json  ...

`request` digests what was asked (schema, kind, config, inputs); `content` digests what came out (names, sizes, hashes).
"""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol

from vqpipe import distributed
from vqpipe.errors import ArtifactError, VqpipeError
from vqpipe.files import digest_json, flush_to_disk, hash_file, write_json
from vqpipe.provenance import now, provenance

SCHEMA = 1
KINDS = (
    *("dataset", "features", "codebook", "tokenizer", "tokens", "report", "images"),
    *("generator", "classifier"),
)


class Input(Protocol):
    """Anything a stage reads: a set of images, a set of features, an artifact."""

    @property
    def digest(self) -> str:
        """sha256 of its content, hex."""

    @property
    def name(self) -> str:
        """A short name, for people."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; see the module's docstring for the two digests."""

    schema: int
    kind: str
    request: str
    content: str
    config: dict[str, Any]
    inputs: dict[str, str]
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    provenance: dict[str, Any]


class Artifact:
    """A published directory: its manifest, checked, and the files it names."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.kind = manifest.kind
        self.config = manifest.config
        self.facts = manifest.facts
        self.inputs = manifest.inputs
        self.content = manifest.content

    @property
    def digest(self) -> str:
        """The content digest: an artifact is itself an Input."""
        return self.content

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def lineage(self) -> dict[str, Any]:
        """This artifact and, nested under `inputs`, all it was made from."""
        return {
            "kind": self.kind,
            "name": self.name,
            "content": self.content,
            "inputs": self.manifest.provenance.get("lineage", {}),
        }

    def file(self, name: str) -> Path:
        """Path of the file `name`.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(
                f"{self.path} ({self.kind}) has no file {name}", "See what it holds with vqpipe inspect"
            )
        return self.path / name

    def names(self, pattern: str = "*") -> list[str]:
        """File names that match the glob `pattern`, sorted."""
        return sorted(name for name in self.manifest.files if PurePosixPath(name).match(pattern))

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ArtifactError: a file's hash, or the manifest's own digest, is not what was published.
        """
        for name, entry in self.manifest.files.items():
            found = hash_file(self.path / name)
            if found != entry["sha256"]:
                raise ArtifactError(
                    f"{self.path / name} is damaged: sha256 {found[:12]}, published as {entry['sha256'][:12]}",
                    "Make it again, or copy it again from its source",
                )
        if content_digest(self.manifest.files) != self.content:
            raise ArtifactError(
                f"{self.path / 'manifest.json'} was edited: its content digest does not match its files"
            )


def lineage(artifact: Artifact) -> dict[str, Any]:
    """The tree of `artifact` and all it was made from: kind, name, content, inputs (role -> the same)."""
    return artifact.lineage


def open_artifact(path: Path | str, kind: str | None = None) -> Artifact:
    """Open a finished directory; check its kind, schema and file sizes (hashes: `Artifact.verify`).

    Raises:
        ArtifactError: it is absent, unfinished, damaged, of another kind, or from a newer vqpipe.
    """
    path = Path(path)
    partial = partial_path(path)
    if not path.exists() and partial.exists():
        done = len(list((partial / ".records").glob("*.json")))
        raise ArtifactError(f"{path} is not finished: {done} files so far in {partial.name}", "Run its command again")
    if not (path / "manifest.json").is_file():
        raise ArtifactError(f"{path} is not a vqpipe artifact: it has no manifest.json", "Check the path")
    manifest = read_manifest(path / "manifest.json")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} is of kind {manifest.kind}, {kind} is needed", "Check which artifact you named")
    for name, entry in manifest.files.items():
        check_name(name)
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise ArtifactError(f"{file} is missing", "Copy or make the artifact again")
        if file.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{file} has {file.stat().st_size} bytes, published with {entry['bytes']}", "Copy it again"
            )
    return Artifact(path, manifest)


def start(out: Path | str, kind: str, config: dict[str, Any], inputs: Mapping[str, Input | str]) -> "Draft | Artifact":
    """Begin, resume, or find finished the artifact `out` for this request. Every rank calls it.

    `inputs` maps a role ("images", "codebook") to what is read: its digest goes into the request, its lineage into the
    provenance. Returns the Artifact where the same request was published already, else a locked Draft.

    Raises:
        ArtifactError: `out` was made, or begun, with another request (the first differing key is named), or another
            process is writing it.
    """
    out = Path(out)
    digests = {role: value if isinstance(value, str) else value.digest for role, value in inputs.items()}
    asked = {"schema": SCHEMA, "kind": kind, "config": json.loads(json.dumps(config)), "inputs": digests}
    draft = Draft(out, asked, {role: lineage_of(value) for role, value in inputs.items()})
    problem: tuple[str, str] | None = None
    published = False
    if distributed.is_main():
        try:
            published = draft.prepare()
        except VqpipeError as error:
            problem = (error.what, error.hint)
    problem, published = distributed.broadcast_object((problem, published))
    if problem is not None:
        raise ArtifactError(*problem)
    return open_artifact(out, kind) if published else draft


class Draft:
    """An artifact being written, in `<out>.partial/`.

    Used as a context manager: leaving it releases the lock, and removes the directory where nothing was written yet.
    """

    def __init__(self, out: Path, asked: dict[str, Any], lineage: dict[str, Any]) -> None:
        self.out = out
        self.path = partial_path(out)
        self.asked = asked
        self.request = digest_json(asked)
        self.lineage = lineage
        self.started = now()
        self._lock: int | None = None

    def __enter__(self) -> "Draft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and not self.has_work():
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def has_work(self) -> bool:
        """Whether anything was written that a resumed run could go on from."""
        return any(path.is_file() and path.name not in ("request.json", ".lock") for path in self.path.rglob("*"))

    def prepare(self) -> bool:
        """Rank 0: take the lock and check the request. True where the artifact is published already."""
        if self.out.exists() or self.out.is_symlink():
            return self.check_published()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".records").mkdir(exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}", "Choose another --out") from None
        self.take_lock()
        if self.out.exists():  # published by another process between our look and our lock
            self.release()
            shutil.rmtree(self.path, ignore_errors=True)
            return self.check_published()
        self.check_request()
        for leftover in self.path.rglob(".writing-*"):
            leftover.unlink()
        return False

    def check_published(self) -> bool:
        existing = open_artifact(self.out)
        if existing.manifest.request != self.request:
            manifest = existing.manifest
            before = {"kind": manifest.kind, "config": manifest.config, "inputs": manifest.inputs}
            raise ArtifactError(
                f"{self.out} exists and was made otherwise: {difference(before, self.asked)}", "Choose another --out"
            )
        return True

    def check_request(self) -> None:
        file = self.path / "request.json"
        if not file.exists():
            write_json(file, self.asked)
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ArtifactError(f"{file} is damaged", f"Delete {self.path} and run again") from None
        if digest_json(before) != self.request:
            raise ArtifactError(
                f"{self.path} was begun with other settings: {difference(before, self.asked)}",
                "Finish it with those settings, delete it, or choose another --out",
            )

    def take_lock(self) -> None:
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ArtifactError(f"{self.out} is being written by {owner}", "Wait for it, or stop it") from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = handle

    def release(self) -> None:
        """Give the lock back (rank 0); harmless when it is not held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def write(self, name: str, **record: Any) -> Iterator[Path]:
        """Write one file: yields a temporary path with the same suffix; afterwards the file is whole and recorded.

        `record` holds small JSON facts that a resumed run needs of this file (rows, skipped counts).
        """
        check_name(name)
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".writing-{target.name}")
        try:
            yield temporary
            flush_to_disk(temporary)
            entry = {"bytes": temporary.stat().st_size, "sha256": hash_file(temporary), "record": record}
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(target.parent)
        write_json(self.record_file(name), {"name": name, **entry})

    def adopt(self, name: str, **record: Any) -> None:
        """Record a file that stands in the draft already (a log that grew during the run)."""
        check_name(name)
        target = self.path / name
        flush_to_disk(target)
        entry = {"bytes": target.stat().st_size, "sha256": hash_file(target), "record": record}
        write_json(self.record_file(name), {"name": name, **entry})

    def record(self, name: str) -> dict[str, Any] | None:
        """The facts given to `write` for a finished file, or None: not written yet, or not as recorded."""
        entry = self.entry(name)
        return None if entry is None else entry["record"]

    def entry(self, name: str) -> dict[str, Any] | None:
        try:
            entry = json.loads(self.record_file(name).read_text(encoding="utf-8"))
            size = (self.path / name).stat().st_size
        except (OSError, ValueError):
            return None
        return entry if entry.get("name") == name and entry.get("bytes") == size else None

    def record_file(self, name: str) -> Path:
        return self.path / ".records" / (name.replace("/", "__") + ".json")

    def publish(self, facts: dict[str, Any]) -> Artifact:
        """Wait for every rank, then make `<out>` out of `<out>.partial`, in one rename. Every rank gets the Artifact.

        Unrecorded files (checkpoints, leftovers) are deleted. Raises:
            ArtifactError: `<out>` has appeared meanwhile.
        """
        distributed.barrier()
        if distributed.is_main():
            self.finish(facts)
        distributed.barrier()
        return open_artifact(self.out)

    def finish(self, facts: dict[str, Any]) -> None:
        records = [json.loads(file.read_text(encoding="utf-8")) for file in (self.path / ".records").glob("*.json")]
        files = {
            record["name"]: {"bytes": record["bytes"], "sha256": record["sha256"]}
            for record in sorted(records, key=lambda record: record["name"])
            if self.entry(record["name"])
        }
        times = {"started": self.started, "finished": now()}
        manifest = Manifest(
            request=self.request,
            content=content_digest(files),
            facts=json.loads(json.dumps(facts, allow_nan=False)),
            files=files,
            provenance={**provenance(distributed.world_size()), **times, "lineage": self.lineage},
            **self.asked,
        )
        write_json(self.path / "manifest.json", asdict(manifest))
        keep = {self.path / name for name in files} | {self.path / "manifest.json"}
        for file in sorted(self.path.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                if not any(file.iterdir()):
                    file.rmdir()
            elif file not in keep:
                file.unlink()
        flush_to_disk(self.path)
        try:
            if self.out.exists():
                raise OSError(errno.EEXIST, "it exists")
            os.rename(self.path, self.out)
        except OSError as error:
            raise ArtifactError(
                f"cannot publish {self.out}: {error.strerror}", f"The work is kept in {self.path}"
            ) from None
        flush_to_disk(self.out.parent)
        self.release()


def partial_path(out: Path) -> Path:
    """Where an artifact stands while it is written."""
    return out.with_name(out.name + ".partial")


def read_manifest(path: Path) -> Manifest:
    """Read and check one `manifest.json`; unknown keys are ignored within a schema."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {table['schema']}, this vqpipe reads {SCHEMA}", "Use the vqpipe that made it"
            )
        manifest = Manifest(**{key: table[key] for key in Manifest.__dataclass_fields__})
        whole = all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in manifest.files.values()
        )
        if manifest.kind not in KINDS or not whole:
            raise ValueError(manifest.kind)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__})", "Copy or make the artifact again") from None
    return manifest


def check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part == ".." or part.startswith(".") for part in parts):
        raise ArtifactError(f"{name!r} is not a file name an artifact may hold")


def difference(before: Any, after: Any, where: str = "") -> str:
    """The first key at which two requests differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [
            key for key in ("kind", *sorted({*before, *after} - {"kind", "schema"})) if key in {*before, *after}
        ]:
            if before.get(key) != after.get(key):
                return difference(before.get(key), after.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {shorten(before)}, now {shorten(after)}"


def shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-4:]


def lineage_of(value: Input | str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"kind": "data", "name": "", "content": value, "inputs": {}}
    leaf = {"kind": "data", "name": value.name, "content": value.digest, "inputs": {}}
    return getattr(value, "lineage", leaf)


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return digest_json([[name, files[name]["bytes"], files[name]["sha256"]] for name in sorted(files)])
