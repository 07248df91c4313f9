"""The rooms of the library, top to bottom; a module imports only its own room and rows below it.

One exception is drawn: whole jobs may use `tokenizer`. typer and rich occur only in `stages`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("stages",),
    ("benchmarks", "analysis"),
    ("generation",),
    ("training", "evaluation"),
    ("codebooks",),
    ("reports",),
    ("continuous",),
    ("tokenizer", "tiling"),
    ("models",),
    ("quantizers", "losses", "metrics", "data"),
    ("search", "artifacts", "weights", "presets"),
    ("config", "device", "distributed", "files", "progress", "provenance"),
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


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = "import sys; from stages import cli; sys.argv = ['vqpipe', '--help']\n"
    program += "try: cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "tokenize" in done.stdout
