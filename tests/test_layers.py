"""The rooms of the library, top to bottom; a module imports only its own room and rows below it.

One exception is drawn: whole jobs may use `tokenizer`. typer and rich occur only in `stages`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("stages",),
    ("benchmarks", "analysis"),
    ("training", "codebooks", "generation", "reports"),
    ("continuous",),
    ("tokenizer", "tiling"),
    ("models",),
    ("quantizers", "losses", "metrics", "data"),
    ("search", "artifacts", "weights", "presets"),
    ("config", "device", "distributed", "files", "progress", "provenance"),
    ("faults",),
    ("errors",),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str | None:
    """`vqpipe.models.vqgan` -> `models`; `stages.train` -> `stages`; others None."""
    parts = dotted.split(".")
    if parts[0] == "stages":
        return "stages"
    return parts[1] if parts[0] == "vqpipe" and len(parts) > 1 and parts[1] in ROW else None


def files() -> list[Path]:
    return [path for folder in ("vqpipe", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]


def own_room(path: Path) -> str | None:
    return room(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_module_imports_downward() -> None:
    wrong = []
    for path in files():
        own = own_room(path)
        if own is None:
            continue
        for target in {room(name) for name in imports(path)} - {None, own}:
            if ROW[target] <= ROW[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert wrong == []


def test_every_room_is_drawn() -> None:
    rooms = {path.stem for path in (ROOT / "vqpipe").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__"} <= set(ROW)


def test_command_line_libraries_occur_only_in_stages() -> None:
    heads = {path: {name.split(".")[0] for name in imports(path)} for path in files() if own_room(path) != "stages"}
    assert [path for path, names in heads.items() if names & {"typer", "rich", "click"}] == []


def test_stages_import_torch_only_inside_commands() -> None:
    """`vqpipe --help` takes under a second only if no stage loads torch, or a module that does, at its top."""
    heavy = []
    for path in sorted((ROOT / "stages").glob("*.py")):
        if path.name == "recipe.py":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = set(imports_of(node))
            light = {"vqpipe", "vqpipe.errors", "vqpipe.presets", "vqpipe.config"}
            bad = {name for name in names if name.split(".")[0] in ("torch", "numpy", "vqpipe") and name not in light}
            bad |= names & {"stages.recipe"}
            heavy += [f"{path.name}: {name}" for name in sorted(bad)]
    assert heavy == []


def imports_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []
