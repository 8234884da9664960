"""The documentation says what the code does: settings, links, decisions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_flows import FlowSettings
from celery_flows.tasks.settings import ENV_PREFIX
from tests.support import cli_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

HEAD = ("| on the app | in the environment | default | what it does |", "|---|---|---|---|")


def settings_table() -> Iterator[str]:
    """The table of docs/settings.md, line by line, from the fields themselves."""
    yield from HEAD
    for name, field in FlowSettings.model_fields.items():
        default = "not set" if field.default is None else "empty" if field.default == () else field.default
        yield f"| `flow_{name}` | `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |"


def test_the_settings_page_lists_every_setting_as_it_is() -> None:
    lines = (ROOT / "docs/settings.md").read_text().splitlines()
    wanted = list(settings_table())
    listed = [line for line in lines if line.startswith("|")]

    assert listed == wanted, "docs/settings.md: put this there\n" + "\n".join(wanted)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    inside = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+://|#", link)]

    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_heading_that_is_linked_to_is_there(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)

        assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_every_file_and_folder_that_the_readme_names_exists() -> None:
    named = re.findall(r"`([\w./-]+\.(?:md|yml|toml|py)|docs/[\w/]+)`", (ROOT / "README.md").read_text())
    made_by_the_reader = {"shop.py"}

    assert [name for name in set(named) - made_by_the_reader if not (ROOT / name).exists()] == []


def test_the_page_of_the_command_line_has_every_command_option_and_shape() -> None:
    listed = cli_reference.PAGE.read_text().partition(cli_reference.BEGIN)[2]

    assert listed == cli_reference.rendered(), "run: python -m tests.support.cli_reference"


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs/decisions").glob("*.md"))]

    assert numbers == list(range(1, len(numbers) + 1))


def test_every_command_of_the_command_line_is_in_the_changelog() -> None:
    from celery_flows.worker.cli import flow

    listed = re.findall(r"celery flow ([\w|]+)", (ROOT / "CHANGELOG.md").read_text())

    assert set(flow.commands) <= {name for names in listed for name in names.split("|")}
