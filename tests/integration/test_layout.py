"""The repository keeps the shape it promises: links, packages, layers, and nothing that ties it to one machine."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("store", "tasks", "worker")
HOLD_PYTHON = ("_celery_flows_pytest.py", "celery_flows", *FOLDERS, "tests", "examples", "benchmarks")
NOT_OURS = {"build", "dist", "__pycache__"}

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Written so that none of them finds itself.
UNWANTED = {
    "a registry's host": r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.\w+|docker\.io|ghcr\.io|quay\.io|debian\.org)\b",
    "a registry option": r"--(?:extra-)?index[-]url|--find[-]links|--trusted[-]host",
    "a path of one machine": r"(?<![\w.])/(?:home|root|Users|work)/\w",
    "work left for later": r"\b(?:TO[D]O|FIX[M]E)\b",
}


def all_files() -> Iterator[Path]:
    """Every file of the repository, each once: not what tools leave behind, and no link is followed."""
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if not (NOT_OURS & {name} or name.endswith(".egg-info") or is_a_tools(name))]
        yield from (Path(folder, name) for name in names)


def is_a_tools(folder: str) -> bool:
    """Whether a folder is .git, .venv or some cache."""
    return folder.startswith(".") and folder != ".ci"


def python_files() -> list[Path]:
    """Every module of ours, by its place in the repository."""
    return sorted(
        path for path in all_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in HOLD_PYTHON
    )


def parse(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_front_door_links_to_each_folder_by_a_relative_path(folder: str) -> None:
    link = ROOT / "celery_flows" / folder

    assert link.readlink() == Path("..", folder)
    assert link.resolve() == (ROOT / folder).resolve()


def test_pyproject_lists_every_package_and_maps_it_to_its_folder() -> None:
    holding = {path.parent.relative_to(ROOT) for path in python_files() if path.relative_to(ROOT).parts[0] in FOLDERS}
    expected = {"celery_flows": "celery_flows"}
    expected |= {".".join(("celery_flows", *folder.parts)): folder.as_posix() for folder in holding}

    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)
    assert SETUPTOOLS["package-dir"] == expected
    assert not [folder for folder in holding if not (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize("name", ["celery_flows", "celery_flows.store", "celery_flows.testing"])
def test_every_public_name_exists_and_is_listed_once(name: str) -> None:
    module = importlib.import_module(name)
    public: list[str] = module.__all__

    assert [each for each in public if not hasattr(module, each)] == []
    assert len(public) == len(set(public))


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(UNWANTED[what])
    found = []
    for path in all_files():
        if path.is_symlink():
            continue
        for number, line in enumerate(path.read_bytes().decode(errors="ignore").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_every_module_says_in_its_docstring_what_it_is_for() -> None:
    silent = [path for path in python_files() if path.read_text().strip() and not ast.get_docstring(parse(path))]

    assert [str(path.relative_to(ROOT)) for path in silent] == []


def test_nobody_imports_the_folders_by_their_bare_names() -> None:
    found = []
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                named = [node.module]
            else:
                continue
            found += [f"{path.relative_to(ROOT)}: {name}" for name in named if name.split(".")[0] in FOLDERS]
    assert found == []


def test_the_store_reads_no_environment() -> None:
    read = [path for path in (ROOT / "store").rglob("*.py") if re.search(r"\b(?:environ|getenv)\b", path.read_text())]

    assert [str(path.relative_to(ROOT)) for path in read] == []


def test_layers_import_only_what_lies_below_them() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_constraints_are_plain_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []
    assert lines == sorted(lines, key=str.casefold)
