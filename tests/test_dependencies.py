"""The dependencies are all used, bounded and pinned; and whose deprecations fail the suite."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"]]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
MODULES = {
    "open_clip_torch": "open_clip",
    "torch-fidelity": "torch_fidelity",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "faiss-gpu": "faiss",
    "faiss-cpu": "faiss",
}
"""Names of packages that are imported under another name."""
UNBOUNDED = {"fsspec", "pyarrow"}
"""Released by date or every few months, and only ever added to."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def imported() -> set[str]:
    """The top-level names that vqpipe and stages import or name to importlib."""
    names = set()
    for folder in ("vqpipe", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names.add(node.module.split(".")[0])
    return names


def test_every_dependency_is_used_and_every_import_declared() -> None:
    declared = {MODULES.get(each.name, each.name) for each in DIRECT}
    data_only = {"skimage"}  # the photographs inside its wheel
    assert declared - data_only <= imported()
    extras = {Requirement(text).name for texts in PROJECT["optional-dependencies"].values() for text in texts}
    known = declared | extras | set(sys.stdlib_module_names) | {"vqpipe", "stages", "triton"}
    assert imported() - known == set()


def test_every_dependency_has_a_lower_bound_and_an_upper_one() -> None:
    for each in DIRECT:
        operators = {part.operator for part in each.specifier}
        assert operators == ({">="} if each.name in UNBOUNDED else {">=", "<"}), each


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins: dict[str, set[str]] = {}
    for pin in PINS:
        assert pin.url is None
        (version,) = pin.specifier
        assert version.operator == "=="
        pins.setdefault(normal(pin.name), set()).add(version.version)
    for each in DIRECT:
        assert all(version in each.specifier for version in pins[normal(each.name)]), each


def test_constraints_pin_what_is_installed_here() -> None:
    """No package of the test environment is missing from constraints.txt."""
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()]
    applicable = {normal(pin.name) for pin in pins}
    installed: dict[str, str] = {}
    for each in metadata.distributions():  # the first counts: copies inside setuptools come later on sys.path
        installed.setdefault(normal(each.name), each.version)
    if any(installed.get(normal(pin.name), "") not in pin.specifier for pin in pins):
        pytest.skip("this environment holds other versions than constraints.txt")
    wanted, found = ["vqpipe"], set[str]()
    while wanted:
        name = wanted.pop()
        extras = {"", "dev", "docs", "fast", "tensorboard", "embedding"} if name == "vqpipe" else {""}
        for text in metadata.requires(name) or []:
            each = Requirement(text)
            if any(each.marker is None or each.marker.evaluate({"extra": extra}) for extra in extras):
                key = normal(each.name)
                if key not in found and key != "vqpipe":
                    found.add(key)
                    wanted.append(key)
    assert found - applicable == set()


def test_the_supported_pythons_are_those_of_the_classifiers() -> None:
    listed = {text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if ":: Python :: 3." in text}
    assert PROJECT["requires-python"] == f">={min(listed, key=Version)}"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in listed


STUB = """
import warnings

def old(category, stacklevel):
    warnings.warn("this goes away", category, stacklevel=stacklevel)
"""
CALLER = """
import runpy
import sys
import pytest
sys.path.insert(0, {folder!r})
import stub

runpy.run_path({conftest!r})["pytest_configure"]()

@pytest.mark.parametrize("stacklevel", [1, 2])
@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_third_party(category, stacklevel):
    stub.old(category, stacklevel)

def test_third_party_user_warning():
    stub.old(UserWarning, 1)

def run_as_vqpipe(source):
    exec(compile(source, {ours!r}, "exec"), {{"stub": stub}})

def test_called_from_vqpipe():
    run_as_vqpipe("stub.old(DeprecationWarning, 2)")

@pytest.mark.parametrize("stacklevel", [1, 2])
def test_raised_in_vqpipe(stacklevel):
    run_as_vqpipe(f"import warnings; warnings.warn('old', DeprecationWarning, stacklevel={{stacklevel}})")
"""


@pytest.mark.parametrize("strict", [False, True])
def test_deprecations_of_vqpipe_fail_and_those_of_other_packages_are_listed(
    tmp_path: Path, python: Any, strict: bool
) -> None:
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    caller = tmp_path / "test_caller.py"
    paths = {"folder": tmp_path, "ours": ROOT / "vqpipe" / "files.py", "conftest": ROOT / "tests" / "conftest.py"}
    caller.write_text(CALLER.format(**{name: str(path) for name, path in paths.items()}), encoding="utf-8")
    words = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-rA"] + ["-W", "error"] * strict
    done = python("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", *words, str(caller))
    passed = set(re.findall(r"^PASSED .*::(\w+)", done.stdout, flags=re.MULTILINE))
    failed = set(re.findall(r"^FAILED .*::(\w+)", done.stdout, flags=re.MULTILINE))
    always = {"test_third_party_user_warning", "test_raised_in_vqpipe"}
    others = {"test_third_party", "test_called_from_vqpipe"}
    assert (passed, failed) == ((set(), always | others) if strict else (others, always)), done.stdout + done.stderr
    assert strict or "this goes away" in done.stdout  # the summary of warnings


@pytest.mark.slow
def test_a_wheel_has_two_packages_and_finds_its_manifests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        files.extractall(tmp_path / "installed")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vqpipe", "stages"}
    program = "from vqpipe.data.manifests import manifest_folder, manifest_names\n"
    program += "print(manifest_folder().parent.parent.name, 'imagenet-1k' in manifest_names())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["installed", "True"], done.stderr
