"""What the commands say of themselves."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from celery_flows.worker.__main__ import main
from celery_flows.worker.cli import flow as flow_commands
from tests.support.commandline import Project


def commands() -> dict[str, click.Command]:
    """Every command of ours, by how it is called."""
    ours = {f"flow {name}": command for name, command in flow_commands.commands.items()}
    return {"flow": flow_commands, **ours, "celery-flows": main, "celery-flows dev": main.commands["dev"]}


@pytest.mark.parametrize("name", commands())
def test_help_explains_the_command_and_each_of_its_options(name: str) -> None:
    command = commands()[name]
    shown = CliRunner().invoke(command, ["--help"], prog_name=name)

    assert shown.exit_code == 0, shown.output
    assert command.help
    assert command.get_short_help_str(200).endswith("."), "the first sentence stands alone in the list of commands"
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []
    assert max(map(len, shown.output.splitlines())) <= 80


def test_celery_itself_shows_the_commands(project: Project) -> None:
    shown = project.done("--help")

    assert [name for name in flow_commands.commands if f"\n  {name} " not in shown] == []
    assert "\n  celery -A APP flow COMMAND" in shown
