"""The package as built: its contents, and that it works beside a user's own tasks.py and worker.py."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("store", "tasks", "worker")
PLUGIN = "_celery_flows_pytest.py"  # pytest loads it for everybody: beside the package, so that it need not import that
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", PLUGIN, "celery_flows", *FOLDERS)

WHO_IS_IMPORTED = """
import importlib, json
names = ["tasks", "worker", "celery_flows", "celery_flows.store", "celery_flows.tasks", "celery_flows.worker"]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


@dataclass(frozen=True)
class Project:
    """A user's project: a folder with modules of theirs, and a Python that has the wheel installed."""

    folder: Path
    python: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs that Python in that folder, as the user would."""
        return run([str(self.python), *arguments], self.folder, **environment)


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; one that fails fails the test and shows its output."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FLOW_", "CELERY_"))}
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the source distribution, from a copy that no earlier build has left anything in."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)], source)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a tasks.py and a worker.py, in a new environment that borrows our dependencies, but not us."""
    folder, environment = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("environment")
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "venv", str(environment)], folder)
    run([str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], folder)
    # A .pth file among those folders, such as our own editable install, is not looked at from here.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed))
    for name in ("tasks", "worker"):
        (folder / f"{name}.py").write_text(f'"""The user\'s own."""\n\nprint("the user\'s own {name}.py")\n')
    yield Project(folder, python)
    shutil.rmtree(environment)


def files_of_the_folders() -> dict[str, Path]:
    """Where in the wheel each file belongs, and where it comes from."""
    sources = [*(ROOT / "celery_flows").glob("*.py"), ROOT / "celery_flows" / "py.typed"]
    expected = {f"celery_flows/{source.name}": source for source in sources} | {PLUGIN: ROOT / PLUGIN}
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            expected[f"celery_flows/{source.relative_to(ROOT).as_posix()}"] = source
    return expected


def test_the_wheel_holds_each_module_once_as_a_plain_file_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
        expected = files_of_the_folders()

        assert sorted(entry.filename for entry in entries) == sorted(expected)
        assert not [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)]
        for name, source in expected.items():
            assert archive.read(name) == source.read_bytes(), name


def test_the_wheel_claims_one_public_import_name_its_commands_its_plugin_and_its_license(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        described = {
            Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name
        }
    metadata = Parser().parsestr(described["METADATA"])

    assert described["top_level.txt"].split() == ["_celery_flows_pytest", "celery_flows"]
    assert "[pytest11]\ncelery_flows = _celery_flows_pytest" in described["entry_points.txt"]
    assert "flow = celery_flows.worker.cli:flow" in described["entry_points.txt"]
    assert "celery-flows = celery_flows.worker.__main__:main" in described["entry_points.txt"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert described["LICENSE"] == (ROOT / "LICENSE").read_text()


def test_beside_a_users_own_tasks_and_worker_each_import_finds_what_it_names(project: Project) -> None:
    printed = project.run("-c", WHO_IS_IMPORTED, FLOW_STORE_URL="sqlite:///flows.sqlite", CELERY_BROKER_URL="memory://")
    found = {name: Path(file) for name, file in json.loads(printed.stdout.splitlines()[-1]).items()}

    installed = project.python.parents[1]
    assert found["tasks"] == project.folder / "tasks.py"
    assert found["worker"] == project.folder / "worker.py"
    for name in ("celery_flows", *(f"celery_flows.{folder}" for folder in FOLDERS)):
        assert found[name].is_relative_to(installed), found
        assert not found[name].is_symlink()


def test_celery_starts_our_app_beside_a_users_own_tasks_and_worker_and_imports_theirs(project: Project) -> None:
    settings = {
        "FLOW_STORE_URL": "sqlite:///flows.sqlite",
        "CELERY_BROKER_URL": "memory://",
        "FLOW_IMPORTS": "tasks,worker",
    }
    report = project.run("-m", "celery", "-A", "celery_flows.worker", "report", **settings)

    assert "software -> celery" in report.stdout
    assert "the user's own tasks.py" in report.stdout
    assert "the user's own worker.py" in report.stdout


def test_the_flow_command_of_the_installed_wheel_brings_a_database_up_to_date(project: Project) -> None:
    settings = {"FLOW_STORE_URL": "sqlite:///migrated.sqlite", "CELERY_BROKER_URL": "memory://"}
    project.run("-m", "celery", "-A", "celery_flows.worker", "flow", "migrate", **settings)

    assert (project.folder / "migrated.sqlite").stat().st_size > 0
