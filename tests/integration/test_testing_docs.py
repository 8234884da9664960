"""docs/guide/testing.md does what it says: its files, as they stand there, are a project whose tests pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PAGE = Path(__file__).parents[2] / "docs/guide/testing.md"


def named(language: str, text: str) -> str:
    """The file that a block is, by its first line."""
    first = re.match(r"# (\w+\.py)\n", text)
    return first[1] if first else {"ini": "pytest.ini"}[language]


def test_the_page_is_a_project_whose_tests_pass(pytester: pytest.Pytester) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    files = {named(language, text): text for language, text in blocks}
    for name, text in files.items():
        (pytester.path / name).write_text(text)

    ended = pytester.runpytest_subprocess(  # its app and tasks are not for the other tests of this process
        "-p", "no:celery", "-p", "no:docker_tools", "-W", "error", "-v"
    )

    ended.assert_outcomes(passed=11)
    ran = set(re.findall(r"^(test_\w+\.py)::", ended.stdout.str(), re.MULTILINE))
    assert ran == {name for name in files if name.startswith("test_")}
    assert len(files) == len(blocks)
