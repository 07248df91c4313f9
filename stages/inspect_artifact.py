"""`vqpipe inspect`: print the manifest, facts and lineage of an artifact."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from stages import console
from vqpipe.errors import ArtifactError, printable
from vqpipe.words import counted


def inspect(
    artifact: Annotated[Path, typer.Argument(help="An artifact directory.", metavar="ARTIFACT")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print an artifact's manifest, facts and lineage.

    Of an unfinished one (DIR.partial), print how far it is.
    """
    from vqpipe.artifacts import open_artifact
    from vqpipe.artifacts.unfinished import find_partial

    unfinished = find_partial(artifact) if artifact.suffix == ".partial" or not artifact.exists() else None
    if unfinished is not None:
        inspect_unfinished(unfinished, verify, as_json)
        return
    opened = open_artifact(artifact)
    if verify:
        opened.verify()
        console.say(f"verified: {counted(len(opened.manifest.files), 'files')} as published")
    if as_json:
        print(json.dumps(asdict(opened.manifest), indent=2, ensure_ascii=False))
        return
    rows = {
        "kind": opened.kind,
        "content": opened.digest[:16],
        "request": opened.manifest.request[:16],
        **{f"fact  {key}": value for key, value in opened.facts.items()},
        **{f"config  {key}": value for key, value in flat(opened.config)},
        "files": f"{len(opened.manifest.files):,}, {sum(f['bytes'] for f in opened.manifest.files.values()):,} bytes",
        "made by": " ".join(opened.manifest.provenance.get("command", [])),
        "finished": opened.manifest.provenance.get("finished", ""),
    }
    out = Console(highlight=False)
    out.print(as_table(rows))
    out.print(draw(opened.lineage))


def inspect_unfinished(folder: Path, verify: bool, as_json: bool) -> None:
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
        **({"last error": found.error} if found.error else {}),
        "finished files": f"{found.files:,}, {found.bytes:,} bytes",
        **{f"{key} in them": f"{count:,}" for key, count in found.counts.items()},
        **{f"saved  {series}": f"{step:,}{of}" for series, step in found.states.items()},
        **({"last step logged": f"{found.logged_step:,}{of}"} if found.logged_step is not None else {}),
        **{f"config  {key}": value for key, value in flat(found.config)},
    }
    Console(highlight=False).print(as_table(rows))


def flat(table: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a table and of the tables in it: `train.steps`, 3000."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", value


def as_table(rows: dict[str, Any]) -> Table:
    """Labels and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in rows.items():
        table.add_row(f"[bold]{escape(label)}[/]", escape(printable(short(value))))
    return table


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
