"""A published artifact: its manifest, validated, and its files."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vqpipe import distributed
from vqpipe.errors import ArtifactError, printable
from vqpipe.files import absent_artifact, digest_json, hash_file, partial_path, with_final_name
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import options_of

SCHEMA = 1
RUNS = ".runs.json"
"""In the directory of an unfinished artifact: the environment and the command of its runs."""
KINDS = {
    "dataset": "vqpipe prepare-data",
    "features": "vqpipe extract-features",
    "codebook": "vqpipe kmeans",
    "tokenizer": "vqpipe train or vqpipe import-checkpoint",
    "tokens": "vqpipe tokenize",
    "latents": "vqpipe train-generator --images",
    "report": "vqpipe eval",
    "images": "vqpipe generate or vqpipe detokenize",
    "generator": "vqpipe train-generator",
    "classifier": "vqpipe train-classifier",
    "statistics": "vqpipe eval-generation --statistics",
    "autoencoder": "vqpipe import-checkpoint",
}
"""Kind -> the commands that publish it."""


class Input(Protocol):
    """Anything a stage reads: a set of images, a set of features, an artifact."""

    @property
    def digest(self) -> str:
        """sha256 of its content, hex."""

    @property
    def name(self) -> str:
        """A short name to display."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; the package's docstring defines the two digests."""

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
    """A published directory. It is an `Input` of other stages, with the content digest of its manifest as `digest`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.name = printable(path.name)
        self.manifest = manifest
        self.kind = manifest.kind
        self.config = manifest.config
        self.facts = manifest.facts
        self.inputs = manifest.inputs
        self.digest = manifest.content

    @property
    def lineage(self) -> dict[str, Any]:
        """Kind, name and content of this artifact and, nested under `inputs`, of everything it was made from."""
        return {
            "kind": self.kind,
            "name": self.name,
            "content": self.digest,
            "inputs": self.manifest.provenance.get("lineage", {}),
        }

    @property
    def command(self) -> list[str]:
        """The words after the name of the program in the command that made it."""
        words: list[str] = self.manifest.provenance.get("command", [])
        return words[1:]

    def options(self, name: str) -> list[str]:
        """The values of an option in the command that made it."""
        return [value for option, value in options_of(self.command) if option == name]

    def file(self, name: str) -> Path:
        """Path of the file `name`.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path} ({self.kind}) has no file {name}", "List its files with vqpipe inspect")
        return self.path / name

    def names(self, pattern: str = "*") -> list[str]:
        """File names that match the glob `pattern`, sorted."""
        return sorted(name for name in self.manifest.files if PurePosixPath(name).match(pattern))

    def verified_file(self, name: str) -> Path:
        """Path of the file `name`, after its sha256 was checked: corrupted weights or ids would load without an error.

        Raises:
            ArtifactError: the manifest does not list it, or its hash differs from the published one.
        """
        path = self.file(name)
        self.check_hash(name, hash_file(path))
        return path

    def verified_bytes(self, name: str) -> bytes:
        """The content of the file `name`, which is read once; errors as `verified_file`."""
        content = self.file(name).read_bytes()
        self.check_hash(name, hashlib.sha256(content).hexdigest())
        return content

    def check_hash(self, name: str, found: str) -> None:
        """Raise an ArtifactError if the sha256 of the file `name` differs from the published one."""
        published = self.manifest.files[name]["sha256"]
        if found != published:
            raise ArtifactError(
                f"{self.path / name} is damaged: sha256 {found[:12]}, published as {published[:12]}",
                "Copy it from its source again, or make it again",
            )

    def read_json(self, name: str) -> Any:
        """The content of the JSON file `name`; errors as `verified_file`."""
        return json.loads(self.verified_bytes(name))

    def verify_files(self, names: Sequence[str], progress: Progress = SILENT) -> None:
        """`verified_file` for many large files, before long work on them. Each rank hashes its share.

        Raises:
            ArtifactError: as `verified_file`, on every rank.
        """
        own = names[distributed.rank() :: distributed.world_size()]
        progress.start(f"checking {self.name}", len(own), "files")
        with distributed.sharing_errors():
            for name in own:
                self.verified_file(name)
                progress.advance()

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ArtifactError: a file's hash, or the manifest's own digest, differs from the published one.
        """
        for name in self.manifest.files:
            self.verified_file(name)
        if content_digest(self.manifest.files) != self.digest:
            raise ArtifactError(
                f"{self.path / 'manifest.json'} was edited: its content digest does not match its files"
            )


def open_artifact(path: Path | str, kind: str | None = None) -> Artifact:
    """Open a published directory; check its kind, schema and file sizes (hashes: `Artifact.verify`).

    Raises:
        ArtifactError: it is absent, unfinished, damaged, of another kind, or of another schema.
    """
    path = with_final_name(Path(path))
    final = path.with_suffix("") if path.suffix == ".partial" else path
    if not (path / "manifest.json").exists() and (path / "request.json").exists() and not final.exists():
        path = final  # the directory of an unfinished one was named
    partial = partial_path(path)
    if not path.exists() and partial.exists():
        command = command_of(partial)
        again = f"Finish it with: {command}" if command else "Run its command again"
        raise ArtifactError(f"{path} is not finished", f"{again}; vqpipe inspect {partial} says how far it is")
    if not path.exists():
        raise absent_artifact(path)
    if not (path / "manifest.json").is_file():
        hint = f"Pass its folder, {path.parent}" if (path.parent / "manifest.json").is_file() else "Check the path"
        raise ArtifactError(f"{path} is not a vqpipe artifact: it has no manifest.json", hint)
    manifest = read_manifest(path / "manifest.json")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} is of kind {manifest.kind}, {kind} is needed", f"Pass what {KINDS[kind]} makes")
    for name, entry in manifest.files.items():
        check_name(name)
        file = path / name
        if not is_own_file(path, name):
            raise ArtifactError(f"{file} is missing", "Copy or make the artifact again")
        if file.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{file} has {file.stat().st_size} bytes, published with {entry['bytes']}", "Copy it again"
            )
    return Artifact(path, manifest)


def is_artifact(path: Path) -> bool:
    """Whether the folder has an artifact's manifest.json, not just any file of that name."""
    try:
        table = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and {"schema", "kind", "request", "files"} <= table.keys()


def command_of(partial: Path) -> str:
    """The command of vqpipe that writes an unfinished artifact; empty if another program writes it."""
    try:
        words = json.loads((partial / RUNS).read_text(encoding="utf-8"))[-1]["command"]
        return printable(shlex.join(words)) if words[0] == "vqpipe" else ""  # else under torchrun, or a script
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def read_manifest(path: Path) -> Manifest:
    """Read and validate a `manifest.json`. Unknown keys are ignored within a schema."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["schema"] != SCHEMA:
            version = table.get("provenance", {}).get("versions", {}).get("vqpipe", "another version")
            raise ArtifactError(
                f"{path} has schema {table['schema']}, this vqpipe reads {SCHEMA}",
                f"Use the vqpipe that made it: {version}",
            )
        manifest = Manifest(**{key: table[key] for key in Manifest.__dataclass_fields__})
        tables = (manifest.config, manifest.inputs, manifest.facts, manifest.files, manifest.provenance)
        command = manifest.provenance.get("command", [])
        valid = (
            manifest.kind in KINDS
            and isinstance(manifest.request, str)
            and isinstance(manifest.content, str)
            and all(isinstance(table, dict) for table in tables)
            and all(isinstance(file["bytes"], int) and isinstance(file["sha256"], str) for file in tables[3].values())
            and isinstance(command, list)
            and all(isinstance(word, str) for word in command)
            and all(map(is_lineage, manifest.provenance.get("lineage", {}).values()))
        )
        if not valid:
            raise ValueError(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", "Check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__})", "Copy or make the artifact again") from None
    return manifest


def is_lineage(node: Any) -> bool:
    """Whether this describes an input, as `Artifact.lineage` does, and those that it was made from."""
    words = [node.get("kind"), node.get("content"), node.get("name") or ""]
    return all(isinstance(word, str) for word in words) and all(map(is_lineage, node.get("inputs", {}).values()))


def check_name(name: str) -> None:
    """Raise an ArtifactError for a file name that is absolute, hidden or leaves the directory."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part == ".." or part.startswith(".") for part in parts):
        raise ArtifactError(f"{name!r} is not a valid file name in an artifact")


def is_own_file(folder: Path, name: str) -> bool:
    """Whether `name` is a file in `folder` that is not reached through a symbolic link."""
    try:
        steps = [folder / part for part in (name, *map(str, PurePosixPath(name).parents))[:-1]]
        return steps[0].is_file() and not any(step.is_symlink() for step in steps)
    except OSError:  # the name is too long for this file system
        return False


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of names, sizes and hashes."""
    return digest_json([[name, files[name]["bytes"], files[name]["sha256"]] for name in sorted(files)])
