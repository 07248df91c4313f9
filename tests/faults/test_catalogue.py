"""The table of faults in README.md lists tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]


@cache
def names_in(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_rows_are_numbered_and_complete() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 114))
    assert all(len(row) == 4 and all(row) for row in ROWS)


def test_every_row_but_one_lists_tests_and_each_exists() -> None:
    listed = {row[0]: re.findall(r"`([\w/]+\.py)::(\w+)`", row[3]) for row in ROWS}
    assert [number for number, tests in listed.items() if not tests] == ["38"]
    missing = {
        f"{file}::{name}" for tests in listed.values() for file, name in tests if name not in names_in(TESTS / file)
    }
    assert sorted(missing) == []


def test_every_test_that_security_md_lists_exists() -> None:
    text = (TESTS.parent / "SECURITY.md").read_text(encoding="utf-8")
    missing, file = set(), ""
    for path, name in re.findall(r"tests/([\w/]+\.py)|`(test_\w+)`", text):
        file = path or file
        if not (TESTS / file).is_file() or (name and name not in names_in(TESTS / file)):
            missing.add(f"{file}::{name}")
    assert sorted(missing) == []
