"""The layers of the library, top to bottom: a module imports only its own room and rooms in rows below it.

No files import each other in a circle, and no command imports another. typer and rich are imported only in `stages`.
Imports inside functions count too.
"""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("stages",),
    ("benchmarks", "analysis"),
    ("planning",),
    ("generation",),
    ("training", "evaluation"),
    ("codebooks",),
    ("reports",),
    ("tiling",),
    ("continuous",),
    ("tokenizer",),
    ("tokenizer_files",),
    ("models", "model_input"),
    ("quantizers", "losses", "metrics", "data", "zoo"),
    ("search", "artifacts", "weights", "presets", "settings", "downloads", "model_card"),
    ("config", "device", "distributed", "provenance", "progress"),
    ("files", "file_kinds", "gpus", "image_size"),
    ("errors", "words"),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
SHARED_BY_COMMANDS = {
    "stages.cli",
    "stages.console",
    "stages.estimates",
    "stages.facts",
    "stages.next_steps",
    "stages.options",
    "stages.plugins",
    "stages.recipe",
    "stages.signals",
    "stages.training_run",
}
"""Modules of `stages` that are no commands."""


def name_of(path: Path) -> str:
    """`vqpipe/models/vqgan.py` -> `vqpipe.models.vqgan`; a package by its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in ("vqpipe", "stages") for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a module imports, at any depth: our own by file, others by dotted name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def room(dotted: str) -> str | None:
    """`vqpipe.models.vqgan` -> `models`; `stages.train` -> `stages`; others None."""
    parts = dotted.split(".")
    if parts[0] == "stages":
        return "stages"
    return parts[1] if parts[0] == "vqpipe" and len(parts) > 1 and parts[1] in ROW else None


def test_every_module_imports_only_rooms_below() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imports(module)
        if (own := room(module)) and (other := room(target)) and own != other and ROW[other] <= ROW[own]
    ]
    assert sorted(wrong) == []


def test_every_room_has_a_row() -> None:
    rooms = {
        path.stem for path in (ROOT / "vqpipe").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(ROW) - {"stages"}


def test_no_modules_import_each_other() -> None:
    """A package's __init__ may re-export its modules, which import it nowhere."""
    graph = {module: imports(module) & MODULES.keys() - {module} for module in MODULES}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_commands_do_not_import_each_other() -> None:
    """`demo` runs the others."""
    commands = {name for name in MODULES if name.startswith("stages.")} - SHARED_BY_COMMANDS
    crossing = [f"{module} imports {target}" for module in commands for target in imports(module) & commands]
    assert sorted(line for line in crossing if not line.startswith("stages.demo ")) == []


def test_command_line_libraries_are_imported_only_in_stages() -> None:
    users = {
        module for module in MODULES for name in imports(module) if name.split(".")[0] in ("typer", "rich", "click")
    }
    assert {room(module) for module in users} == {"stages"}


def test_help_of_every_command_and_wrong_usage_import_neither_torch_nor_numpy() -> None:
    program = """
import sys
from stages import cli
for words in [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["train", "--out", "lc"]]:
    sys.argv = ["vqpipe", *words]
    try:
        cli.main()
    except SystemExit:
        heavy = sorted({"torch", "numpy", "pyarrow", "matplotlib", "jinja2"} & sys.modules.keys())
        if heavy:
            sys.exit(f"vqpipe {words} imports {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert all(f"vqpipe {name} [OPTIONS]" in done.stdout for name in ("train", "eval", "zoo"))
