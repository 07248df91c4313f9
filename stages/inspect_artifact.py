"""`vqpipe inspect`: print the facts, the command and the lineage of an artifact, or its whole manifest."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from stages import console, options
from vqpipe.config import flat
from vqpipe.errors import ArtifactError, printable
from vqpipe.words import counted

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact


def inspect(
    artifact: Annotated[
        Path, typer.Argument(help="An artifact directory, or a tokenizer as --tokenizer names it.", metavar="ARTIFACT")
    ],
    settings: Annotated[bool, typer.Option("--settings", help="Print the settings that it was made with too.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Print an artifact's facts, command and lineage.

    Of an unfinished one (DIR.partial), print how far it is.
    """
    options.check_artifacts(artifact)  # before PyTorch is loaded
    from vqpipe.artifacts import open_artifact
    from vqpipe.artifacts.unfinished import find_partial

    unfinished = find_partial(artifact) if artifact.suffix == ".partial" or not artifact.exists() else None
    if unfinished is not None:
        inspect_unfinished(unfinished, settings, verify, as_json)
        return
    from stages import facts

    opened = saved_tokenizer(artifact) or open_artifact(artifact)
    manifest = opened.manifest
    if verify and not manifest.provenance:
        raise ArtifactError(f"{artifact} has no manifest with the hashes of its files", "Omit --verify")
    if verify:
        opened.verify()
        console.say(f"verified: {counted(len(manifest.files), 'files')} as published")
    if as_json:
        print(json.dumps(asdict(manifest), indent=2, ensure_ascii=False))
        return
    rows = {
        "kind": opened.kind,
        "facts": "\n".join(map(short, facts.phrases(opened.facts))),
        "made by": made_by(manifest.provenance.get("command", [])),
        "finished": manifest.provenance.get("finished", ""),
        "files": files_in_words(len(manifest.files), sum(file["bytes"] for file in manifest.files.values())),
        "folder": str(opened.path),
        "content": f"{opened.digest[:16]}  hash of the files",
        "request": f"{manifest.request[:16]}  hash of the settings and inputs" if manifest.request else "",
    }
    out = Console(highlight=False)
    out.print(console.labelled(rows))
    out.print("\nmade from, each with the start of its content hash:")
    out.print(draw(opened.lineage))
    print_settings(out, artifact, opened.config, settings)


def made_by(command: list[str]) -> str:
    """The command, to copy and run again: `python -m stages` and torchrun record `__main__.py` as the program."""
    return shlex.join(["vqpipe", *command[1:]] if command[:1] == ["__main__.py"] else command)


def saved_tokenizer(path: Path) -> "Artifact | None":
    """A tokenizer without a manifest, such as builtin:photos-f8, as an artifact; None for everything else."""
    by_name = str(path).startswith(("builtin:", "hf:"))
    if not by_name and ((path / "manifest.json").exists() or not (path / "config.json").exists()):
        return None
    from vqpipe.artifacts.artifact import SCHEMA, Artifact, Manifest
    from vqpipe.files import hash_file
    from vqpipe.tokenizer import Tokenizer
    from vqpipe.tokenizer_files import StoredWeights, model_facts

    tokenizer = Tokenizer.from_pretrained(path)
    if not isinstance(stored := tokenizer.source, StoredWeights):
        return tokenizer.artifact
    files = [file for file in sorted(stored.folder.iterdir()) if file.is_file()]
    manifest = Manifest(
        schema=SCHEMA,
        kind="tokenizer",
        request="",
        content=stored.digest,
        config=tokenizer.to_table(),
        inputs={},
        facts={**model_facts(tokenizer.autoencoder), "image_size": tokenizer.image_size},
        files={file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files},
        provenance={},
    )
    return Artifact(stored.folder, manifest)


def inspect_unfinished(folder: Path, settings: bool, verify: bool, as_json: bool) -> None:
    """Print how far an unfinished artifact is."""
    if verify:
        raise ArtifactError(f"{folder} is not finished", "--verify is for finished artifacts")
    from vqpipe.artifacts.unfinished import read_unfinished

    found = read_unfinished(folder)
    if as_json:
        print(json.dumps({**asdict(found), "path": str(folder)}, indent=2, ensure_ascii=False))
        return
    steps = found.config.get("train", {}).get("steps") or found.config.get("iterations")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    rows = {
        "kind": f"{found.kind}, not finished",
        "written by": found.writer or "no process now: run its command again to continue",
        "command": found.command,
        "last error": found.error,
        "finished files": files_in_words(found.files, found.bytes),
        **{f"{key} in them": f"{count:,}" for key, count in found.counts.items()},
        **{f"saved  {series}": f"{step:,}{of}" for series, step in found.states.items()},
        "last step logged": "" if found.logged_step is None else f"{found.logged_step:,}{of}",
    }
    out = Console(highlight=False)
    out.print(console.labelled(rows))
    print_settings(out, folder, found.config, settings)


def print_settings(out: Console, path: Path, config: Mapping[str, Any], wanted: bool) -> None:
    """Print the settings, or the option that prints them."""
    rows = {name: "not set" if value is None else short(value) for name, value in flat(config)}
    if wanted:
        out.print("\nsettings:")
        out.print(console.labelled(rows))
    elif rows:
        command = shlex.join(["vqpipe", "inspect", str(path), "--settings"])
        console.say(f"\n{command} prints its {counted(len(rows), 'settings')} too.")


def files_in_words(number: int, size: int) -> str:
    """The number of files and their size."""
    return f"{counted(number, 'files')}, {size:,} bytes"


def draw(node: dict[str, Any], role: str = "", tree: Tree | None = None) -> Tree:
    """The lineage as a tree: an artifact, and under it its inputs."""
    name = f" {node['name']}" if node.get("name") else ""
    label = escape(printable(f"{role + ': ' if role else ''}{node['kind']}{name}  {node['content'][:12]}"))
    branch = Tree(label) if tree is None else tree.add(label)
    for child_role, child in node.get("inputs", {}).items():
        draw(child, child_role, branch)
    return branch


def short(value: Any) -> str:
    """As text of at most 300 characters; numbers with six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."
