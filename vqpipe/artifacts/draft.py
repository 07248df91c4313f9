"""An artifact being written: locked, resumed at its first missing file, published in one rename."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from vqpipe import distributed
from vqpipe.artifacts import lock
from vqpipe.artifacts.lock import Lock
from vqpipe.artifacts.published import (
    SCHEMA,
    Artifact,
    Input,
    Manifest,
    check_name,
    content_digest,
    open_artifact,
    partial_path,
)
from vqpipe.artifacts.status import disk_errors, forget_failure, is_status, note_failure
from vqpipe.config import difference
from vqpipe.errors import ArtifactError
from vqpipe.faults import fault
from vqpipe.files import digest_json, flush_to_disk, hash_file, let_read, rename, write_json
from vqpipe.provenance import now, provenance, surroundings

LOG = logging.getLogger("vqpipe")
RUNS = ".runs.json"


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
    published = distributed.on_main(draft.prepare)
    return open_artifact(out, kind) if published else draft


class Draft:
    """An artifact being written, in `<out>.partial/`.

    Used as a context manager: leaving it releases the lock, and removes the directory where nothing was written yet. An
    error that leaves it is noted down in `status.json` there, if it is the first of all ranks.
    """

    def __init__(self, out: Path, asked: dict[str, Any], lineage: dict[str, Any]) -> None:
        self.out = out
        self.path = partial_path(out)
        self.asked = asked
        self.request = digest_json(asked)
        self.lineage = lineage
        self.started = now()
        self.lock = Lock(self.path, out)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            note_failure(self.path, error)
        if self.lock.held and not self.has_work():
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()

    def has_work(self) -> bool:
        """Whether anything was written that a resumed run could go on from."""
        ours = ("request.json", lock.NAME, RUNS)
        return any(
            path.is_file() and path.name not in ours and not is_status(path.name) for path in self.path.rglob("*")
        )

    def prepare(self) -> bool:
        """Rank 0: take the lock and check the request. True where the artifact is published already."""
        with disk_errors(self.path):
            if self.out.exists() or self.out.is_symlink():
                return self.check_published()
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".records").mkdir(exist_ok=True)
            self.lock.take()
        try:
            if self.out.exists():  # published by another process between our look and our lock
                shutil.rmtree(self.path, ignore_errors=True)
                published = self.check_published()
            else:
                with disk_errors(self.path):
                    published = self.resume()
        except BaseException:
            self.lock.release()
            raise
        if published:
            self.lock.release()
        return published

    def resume(self) -> bool:
        """Clear up after an earlier run and check its request. True where only the last rename was left to do."""
        forget_failure(self.path)
        for leftover in self.path.rglob(".writing-*"):
            leftover.unlink()
        try:
            found = open_artifact(self.path).manifest  # killed between the manifest and the rename that publishes
        except ArtifactError:
            self.check_request()
            self.note_surroundings()
            return False
        self.check_same(found, self.path)
        self.tidy(found.files)
        self.put_in_place()
        return True

    def check_published(self) -> bool:
        """Whether what stands at `out` answers this request; another request is an ArtifactError."""
        if not (self.out / "manifest.json").is_file():
            raise ArtifactError(f"{self.out} exists and is not an artifact of vqpipe", "Choose another --out")
        self.check_same(open_artifact(self.out).manifest, self.out)
        with suppress(OSError):  # of a run that was killed just after it had published
            (self.out / lock.NAME).unlink(missing_ok=True)
        return True

    def check_same(self, manifest: Manifest, path: Path) -> None:
        """Raise an ArtifactError where what stands at `path` answers another request."""
        if manifest.request != self.request:
            before = {"kind": manifest.kind, "config": manifest.config, "inputs": manifest.inputs}
            raise ArtifactError(
                f"{path} exists and was made otherwise: {difference(before, self.asked)}", "Choose another --out"
            )

    def check_request(self) -> None:
        """Note down what is asked, or compare it with what an earlier run noted down: an ArtifactError if unlike."""
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

    def note_surroundings(self) -> None:
        """Keep where each run of this draft ran, and say so where that is not where the one before it did."""
        here = json.loads(json.dumps(surroundings(distributed.world_size())))
        runs = self.earlier_runs()
        if runs and runs[-1] != here:
            LOG.warning(
                "%s was begun elsewhere: %s; the manifest will name both", self.path, difference(runs[-1], here)
            )
        if not runs or runs[-1] != here:
            write_json(self.path / RUNS, [*runs, here])

    def earlier_runs(self) -> list[dict[str, Any]]:
        """Where the runs of this draft ran, each that differs from the one before; nothing where that is not known."""
        try:
            runs = json.loads((self.path / RUNS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return runs if isinstance(runs, list) and all(isinstance(run, dict) for run in runs) else []

    @contextmanager
    def write(self, name: str, **record: Any) -> Iterator[Path]:
        """Write one file: yields a temporary path with the same suffix; afterwards the file is whole and recorded.

        `record` holds small JSON facts that a resumed run needs of this file (rows, skipped counts).
        """
        check_name(name)
        target = self.path / name
        temporary = target.with_name(f".writing-{target.name}")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fault("write")
                yield temporary
                fault("written")
                let_read(temporary)
                flush_to_disk(temporary)
                entry = {"bytes": temporary.stat().st_size, "sha256": hash_file(temporary), "record": record}
                rename(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            flush_to_disk(target.parent)
            write_json(self.record_file(name), {"name": name, **entry})

    def adopt(self, name: str, **record: Any) -> None:
        """Record a file that stands in the draft already (a log that grew during the run)."""
        check_name(name)
        target = self.path / name
        with disk_errors(target):
            let_read(target)
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
        """Rank 0: write the manifest, delete what is not recorded, rename."""
        records = [json.loads(file.read_text(encoding="utf-8")) for file in (self.path / ".records").glob("*.json")]
        files = {
            record["name"]: {"bytes": record["bytes"], "sha256": record["sha256"]}
            for record in sorted(records, key=lambda record: record["name"])
            if self.entry(record["name"])
        }
        times = {"started": self.started, "finished": now()}
        earlier = self.earlier_runs()
        runs = {"runs": earlier} if len(earlier) > 1 else {}
        manifest = Manifest(
            request=self.request,
            content=content_digest(files),
            facts=json.loads(json.dumps(facts, allow_nan=False)),
            files=files,
            provenance={**provenance(distributed.world_size()), **times, **runs, "lineage": self.lineage},
            **self.asked,
        )
        with disk_errors(self.path):
            write_json(self.path / "manifest.json", asdict(manifest))
            self.tidy(files)
        self.put_in_place()

    def put_in_place(self) -> None:
        """Give the whole directory its name, and the lock back."""
        fault("rename")
        try:
            if self.out.exists():
                raise OSError(errno.EEXIST, "it exists")
            os.rename(self.path, self.out)
        except OSError as error:
            raise ArtifactError(
                f"cannot publish {self.out}: {error.strerror}", f"The work is kept in {self.path}"
            ) from None
        fault("renamed")
        (self.out / lock.NAME).unlink(missing_ok=True)
        flush_to_disk(self.out.parent)
        self.lock.release()

    def tidy(self, files: Mapping[str, Any]) -> None:
        """Delete all but `files`, the manifest and the lock, which is held until the directory has its name."""
        keep = {self.path / name for name in (*files, "manifest.json", lock.NAME)}
        for file in sorted(self.path.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                if not any(file.iterdir()):
                    file.rmdir()
            elif file not in keep:
                file.unlink()
        flush_to_disk(self.path)


def lineage_of(value: Input | str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"kind": "data", "name": "", "content": value, "inputs": {}}
    leaf = {"kind": "data", "name": value.name, "content": value.digest, "inputs": {}}
    return getattr(value, "lineage", leaf)
