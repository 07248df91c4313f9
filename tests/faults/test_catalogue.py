"""Every row of the catalogue of faults is answered by a test, or says why not."""

import ast
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
CATALOGUE: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("catalogue.py")))


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def numbered() -> set[int]:
    """The rows that stand in the names of tests here: `test_row_42_...`, `test_rows_28_31_...`."""
    names = [name for file in Path(__file__).parent.glob("test_*.py") for name in names_in(file)]
    found = [re.match(r"test_rows?_((?:\d+_)+)", name) for name in names]
    return {int(number) for match in found if match for number in match[1].rstrip("_").split("_")}


def test_every_row_is_accounted_for() -> None:
    answered = numbered() | CATALOGUE["ELSEWHERE"].keys()
    unanswered = CATALOGUE["NOT_TESTABLE"].keys()
    assert answered & unanswered == set()
    assert answered | unanswered == set(CATALOGUE["ROWS"])


def test_every_test_named_exists() -> None:
    named = {name for names in CATALOGUE["ELSEWHERE"].values() for name in names}
    missing = [name for name in sorted(named) if name.split("::")[1] not in names_in(TESTS / name.split("::")[0])]
    assert missing == []
