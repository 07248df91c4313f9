"""An artifact that is being written: locked, resumed at its first missing file, published in one rename.

A failed run leaves `<out>.partial/status.json`:

    {"error": the line the user saw, "cause": `VqpipeError.sysexit_code`, "rank": the rank that failed first}

Under torchrun the exit code is 1 whatever happened, and the other ranks only report that one has ended. The next run
of the command deletes the file.
"""

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
from vqpipe.artifacts.artifact import (
    RUNS,
    SCHEMA,
    Artifact,
    Input,
    Manifest,
    check_name,
    content_digest,
    open_artifact,
)
from vqpipe.artifacts.lock import Lock
from vqpipe.config import difference
from vqpipe.errors import ArtifactError, VqpipeError
from vqpipe.files import (
    FORBIDDEN,
    atomic_write,
    check_out,
    copy_read_permission,
    digest_json,
    disk_errors,
    flush_to_disk,
    hash_file,
    json_bytes,
    partial_path,
    write_json,
)
from vqpipe.provenance import command, environment, now, provenance
from vqpipe.words import first_names

LOG = logging.getLogger("vqpipe")
STATUS = "status.json"
TOLERANCE, TOLERANCE_SECTIONS = "max_skipped", ("data", "eval")
"""The setting that decides only whether a run stops, and the sections of a config that may hold it."""
SKIPPED = "skipped.parquet"
"""The list of the images that could not be used; it is written where there are any."""
IMAGE_ROLES = ("images", "source", "validation", "reference")
"""The roles of inputs that can be images."""
LISTS = {"files": "files", "compare": "reports"}
"""Key of a config that lists names -> what they are."""


def start(
    out: Path | str,
    kind: str,
    config: dict[str, Any],
    inputs: Mapping[str, Input | str],
    *,
    option: str = "--out",
    tolerance: str = "--max-skipped",
    remedies: Mapping[str, str] | None = None,
) -> "Draft | Artifact":
    """Start or resume the artifact `out`, or return it if it is already published. Every rank calls it.

    `inputs` maps a role ("images", "codebook") to what is read: its digest is part of the request, its lineage of the
    provenance. `option` is the command-line option that names `out`, and `tolerance` the one that sets the largest
    share of unusable images, for messages; `remedies` says what to do where `out` was made with another value of a
    setting, by its name. Returns the Artifact if it was published with the same request, else a locked Draft. The
    tolerance is not compared: it changes no byte of what is written.

    Raises:
        ArtifactError: `out` was made or started with another request (the message names the first differing key), or
            another process is writing it.
    """
    out = Path(out)
    check_out(out, option)
    with disk_errors(partial_path(out)):
        if os.path.lexists(out) and not (out / "manifest.json").is_file():  # before the images are hashed
            raise ArtifactError(f"{out} exists and is not an artifact of vqpipe", f"Choose another {option}")
    found = [value for value in inputs.values() if not isinstance(value, str)]
    distributed.on_machine_first(lambda: [value.digest for value in found])  # that of a folder reads and caches it
    digests = {role: value if isinstance(value, str) else value.digest for role, value in inputs.items()}
    requested = {"schema": SCHEMA, "kind": kind, "config": json.loads(json.dumps(config)), "inputs": digests}
    lineage = {role: lineage_of(value) for role, value in inputs.items()}
    draft = Draft(out, requested, lineage, option, tolerance, remedies or {})
    if distributed.on_main(draft.prepare):
        return open_artifact(out, kind)
    draft.request = distributed.broadcast_object(draft.request)
    return draft


class Draft:
    """An artifact that is being written, in `<out>.partial/`.

    A context manager: leaving it releases the lock, and removes the directory if nothing was written yet. The first
    error of all ranks is kept in `status.json`.
    """

    def __init__(
        self,
        out: Path,
        requested: dict[str, Any],
        lineage: dict[str, Any],
        option: str,
        tolerance: str,
        remedies: Mapping[str, str],
    ) -> None:
        self.out, self.option, self.tolerance, self.remedies = out, option, tolerance, remedies
        self.path = partial_path(out)
        self.requested = requested
        self.kind: str = requested["kind"]
        self.request = digest_json(requested)
        """The digest of the request that the draft was begun with: another tolerance does not change it."""
        self.lineage = lineage
        self.started = now()
        self.lock = Lock(self.path, out)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            write_status(self.path, error)
        if self.lock.held and not self.has_files():
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()

    def has_files(self) -> bool:
        """Whether anything was written from which a run could resume."""
        own = ("request.json", lock.NAME, RUNS, STATUS)
        files = (path for path in self.path.rglob("*") if path.is_file())
        return any(path.name not in own and not path.name.endswith(f"-{STATUS}") for path in files)

    def prepare(self) -> bool:
        """On rank 0: take the lock and check the request. True if the artifact is published already."""
        with disk_errors(self.path):
            if self.out.exists() or self.out.is_symlink():
                return self.check_published()
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".records").mkdir(exist_ok=True)
            self.lock.acquire()
        try:
            if self.out.exists():  # another process published it after the check above
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
        """Delete leftovers of an earlier run and check its request. True if only the last rename was missing."""
        (self.path / STATUS).unlink(missing_ok=True)
        for leftover in self.path.rglob(".writing-*"):
            leftover.unlink()
        try:
            found = open_artifact(self.path).manifest  # killed between the manifest and the rename that publishes
        except ArtifactError:
            self.check_request()
            self.record_environment()
            return False
        self.check_same(vars(found), self.path)
        self.delete_unrecorded(found.files)
        self.move_into_place()
        return True

    def check_published(self) -> bool:
        """True if `out` was made with this request; otherwise raise an ArtifactError."""
        self.check_same(vars(open_artifact(self.out).manifest), self.out)
        with suppress(OSError):  # of a run that was killed right after it published
            (self.out / lock.NAME).unlink(missing_ok=True)
        return True

    def check_same(self, stored: Mapping[str, Any], path: Path, *, unfinished: bool = False) -> None:
        """Raise an ArtifactError if what is at `path` was made, or started, by another request, `stored`."""
        before, after = compared(stored), compared(self.requested)
        if digest_json(before) == digest_json(after):
            return
        what = f"{path} was started with" if unfinished else f"{path} exists and was made with"
        choose = f"Choose another {self.option}"
        if role := self.changed_images(before, after):
            name = self.lineage[role]["name"]
            earlier = stored.get("provenance", {}).get("lineage", {}).get(role, {}).get("name") or name
            if earlier != name:
                raise ArtifactError(f"{what} other images: {earlier}, not {name}", choose)
            changed = f"a file of {name} was added, removed or changed since, or the place or --limit is another"
            finish = f"; with those files, a larger {self.tolerance} finishes it with what is written"
            listed = unfinished and (path / SKIPPED).exists()
            raise ArtifactError(
                f"{what} other images: {changed}", f"{choose}, or restore those files{finish if listed else ''}"
            )
        words = difference_in_words(before, after)
        if unfinished:
            choose = f"Finish it with those, delete it, or choose another {self.option}"
        else:
            remedies = (each for name, each in self.remedies.items() if f"other settings: {name} was" in words)
            choose = next(remedies, choose)
        raise ArtifactError(f"{what} {words}", choose)

    def changed_images(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        """The first role in which two requests differ, if only by the content of images; otherwise empty."""
        inputs = before["inputs"], after["inputs"]
        changed = [role for role in inputs[1] if inputs[0].get(role) != inputs[1][role]]
        same_settings = {**before, "inputs": None} == {**after, "inputs": None} and inputs[0].keys() == inputs[1].keys()
        if not changed or not same_settings or any(role not in IMAGE_ROLES for role in changed):
            return ""
        source = self.lineage[changed[0]]
        return changed[0] if source["kind"] == "data" and source["name"] else ""

    def check_request(self) -> None:
        """Store the request, or raise an ArtifactError if an earlier run stored another one."""
        file = self.path / "request.json"
        if not file.exists():
            write_json(file, self.requested)
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            self.check_same(stored, self.path, unfinished=True)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f"{file} is damaged", f"Delete {self.path} and run again") from None
        self.request = digest_json(stored)

    def record_environment(self) -> None:
        """Store the environment and the command of this run; warn if the environment differs from that of the run
        before."""
        here = json.loads(json.dumps(environment(distributed.world_size())))
        runs = self.earlier_runs()
        before = {key: value for key, value in runs[-1].items() if key != "command"} if runs else None
        if before is not None and before != here:
            LOG.warning(
                "%s was begun in another environment: %s; the manifest will list both",
                self.path,
                difference(before, here),
            )
        if before != here:
            write_json(self.path / RUNS, [*runs, {**here, "command": command()}])

    def earlier_runs(self) -> list[dict[str, Any]]:
        """The environments of the runs of this draft, each different from the one before; empty if unknown."""
        try:
            runs = json.loads((self.path / RUNS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return runs if isinstance(runs, list) and all(isinstance(run, dict) for run in runs) else []

    @contextmanager
    def write(self, name: str, **record: Any) -> Iterator[Path]:
        """Write one file: yields a temporary path with the same suffix; afterwards the file is whole and recorded.

        `record` holds small JSON values that a resumed run needs about this file (rows, skipped counts).
        """
        check_name(name)
        target = self.path / name
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as temporary:
                yield temporary
            self.write_record(name, record)

    def write_bytes(self, name: str, content: bytes, **record: Any) -> None:
        """Write `content` as a file, as `write`."""
        with self.write(name, **record) as path:
            path.write_bytes(content)

    def write_text(self, name: str, content: str) -> None:
        """Write `content` as a file in UTF-8, as `write`."""
        self.write_bytes(name, content.encode("utf-8"))

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` as a JSON file, as `write`."""
        self.write_bytes(name, json_bytes(content))

    def record_existing(self, name: str, **record: Any) -> None:
        """Record a file that is in the draft already (a log that grew during the run)."""
        check_name(name)
        target = self.path / name
        with disk_errors(target):
            copy_read_permission(target)
            flush_to_disk(target)
            self.write_record(name, record)

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Record a finished file with its size and hash."""
        file = self.path / name
        entry = {"bytes": file.stat().st_size, "sha256": hash_file(file), "record": record}
        write_json(self.record_file(name), {"name": name, **entry})

    def record(self, name: str) -> dict[str, Any] | None:
        """The values given to `write` for a finished file; None if it is absent or not as recorded."""
        entry = self.entry(name)
        return None if entry is None else entry["record"]

    def entry(self, name: str) -> dict[str, Any] | None:
        """What `write_record` stored about a finished file; None if it is absent or not as recorded."""
        try:
            entry = json.loads(self.record_file(name).read_text(encoding="utf-8"))
            size = (self.path / name).stat().st_size
        except (OSError, ValueError):
            return None
        return entry if entry.get("name") == name and entry.get("bytes") == size else None

    def record_file(self, name: str) -> Path:
        """The path of the record of a file, which holds the name: names may be too long, or differ in `/` alone."""
        return self.path / ".records" / f"{digest_json(name)}.json"

    def publish(self, facts: dict[str, Any]) -> Artifact:
        """Wait for every rank, then turn `<out>.partial` into `<out>` in one rename. Every rank gets the Artifact.

        Files without a record (checkpoints, leftovers) are deleted.

        Raises:
            ArtifactError: `<out>` has appeared in the meantime.
        """
        distributed.barrier()
        if distributed.is_main():
            self.finish(facts)
        distributed.barrier()
        return open_artifact(self.out)

    def finish(self, facts: dict[str, Any]) -> None:
        """On rank 0: write the manifest, delete files without a record, rename."""
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
            request=digest_json(self.requested),
            content=content_digest(files),
            facts=json.loads(json.dumps(facts, allow_nan=False)),
            files=files,
            provenance={**provenance(distributed.world_size()), **times, **runs, "lineage": self.lineage},
            **self.requested,
        )
        with disk_errors(self.path):
            write_json(self.path / "manifest.json", asdict(manifest))
            self.delete_unrecorded(files)
        self.move_into_place()

    def delete_unrecorded(self, files: Mapping[str, Any]) -> None:
        """Delete everything but `files`, the manifest, and the lock, which is held until after the rename."""
        keep = {self.path / name for name in (*files, "manifest.json", lock.NAME)}
        for file in sorted(self.path.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                if not any(file.iterdir()):
                    file.rmdir()
            elif file not in keep:
                file.unlink()
        flush_to_disk(self.path)

    def move_into_place(self) -> None:
        """Rename the directory to `out` and release the lock."""
        try:
            if self.out.exists():
                raise OSError(errno.EEXIST, "it exists")
            os.rename(self.path, self.out)
        except OSError as error:
            raise ArtifactError(
                f"cannot publish {self.out}: {error.strerror}", f"The work is kept in {self.path}"
            ) from None
        (self.out / lock.NAME).unlink(missing_ok=True)
        flush_to_disk(self.out.parent)
        self.lock.release()


def compared(request: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a request that decides what is written: all but the tolerance."""
    config = {
        name: without_tolerance(value) if name in TOLERANCE_SECTIONS and isinstance(value, Mapping) else value
        for name, value in without_tolerance(request["config"]).items()
    }
    return {"schema": request["schema"], "kind": request["kind"], "config": config, "inputs": request["inputs"]}


def difference_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first difference of two requests, after "made with": `other settings: train.steps was 100, now 200`."""
    if before["kind"] == after["kind"] and before["config"] == after["config"]:
        inputs, now = before["inputs"], after["inputs"]
        role = next((each for each in sorted({*inputs, *now}) if inputs.get(each) != now.get(each)), "")
        if role in inputs and role in now:
            return f"{'other' if role.endswith('s') else 'another'} {role}"
        if role:
            return f"{'a' if role in inputs else 'no'} {role}"
    for key, noun in LISTS.items():
        names, now_named = before["config"].get(key), after["config"].get(key)
        if isinstance(names, list) and isinstance(now_named, list) and names != now_named:
            new, gone = (
                [each for each in now_named if each not in names],
                [each for each in names if each not in now_named],
            )
            if new and gone:
                return f"other {noun}: {first_names(gone)}, not {first_names(new)}"
            kept = f"without {first_names(new)}" if new else f"also {first_names(gone)}" if gone else "in another order"
            return f"other {noun}: {kept}"
    return f"other settings: {difference(before, after).removeprefix('config.')}"


def without_tolerance(table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a table without the tolerance."""
    return {name: value for name, value in table.items() if name != TOLERANCE}


def lineage_of(value: Input | str) -> dict[str, Any]:
    """The lineage of an input: that of an artifact, else a leaf."""
    if isinstance(value, str):
        return {"kind": "data", "name": "", "content": value, "inputs": {}}
    leaf = {"kind": "data", "name": value.name, "content": value.digest, "inputs": {}}
    return getattr(value, "lineage", leaf)


def write_status(folder: Path, error: Exception) -> None:
    """Write `error` to the folder's status.json, unless another rank was first. Never raises."""
    line = str(error) if isinstance(error, VqpipeError) else f"{type(error).__name__}: {error}"
    rank = distributed.rank()
    table = {"error": " ".join(line.split()), "cause": sysexit_code_of(error), "rank": rank}
    temporary = folder / f".writing-{rank}-{STATUS}"
    with suppress(OSError, ValueError):
        try:
            temporary.write_text(json.dumps(table) + "\n", encoding="utf-8")
            os.link(temporary, folder / STATUS)  # unlike a rename, it does not replace the status of another rank
        finally:
            temporary.unlink(missing_ok=True)


def sysexit_code_of(error: BaseException) -> int:
    """The number of an error, as in `VqpipeError.sysexit_code`."""
    if isinstance(error, VqpipeError):
        return error.sysexit_code
    if isinstance(error, OSError):
        return 77 if error.errno in FORBIDDEN else 66 if error.errno == errno.ENOENT else 74
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist")):
        return 75  # another rank ended; it should have its own error
    return 70
