"""The generated part of docs/reference/cli.md: commands and options from click itself, shapes from their source.

``python -m tests.support.cli_reference`` writes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from celery_flows.worker.cli import flow, shapes
from celery_flows.worker.cli.command import FlowCommand
from tests.support.commandline import ROOT

PAGE = ROOT / "docs/reference/cli.md"
BEGIN = "<!-- From here on this page is made by: python -m tests.support.cli_reference -->\n"


def rendered() -> str:
    """What has to stand below the mark."""
    return "\n".join([*_commands(), *_shapes()]) + "\n"


def _commands() -> Iterator[str]:
    yield "\n## Commands\n"
    for name, command in sorted(flow.commands.items()):
        assert isinstance(command, FlowCommand)
        yield from _command(name, command)


def _command(name: str, command: FlowCommand) -> Iterator[str]:
    context = click.Context(command, info_name=f"celery -A APP flow {name}")
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f"### {name}\n"
    yield f"```\n{context.info_name} {pieces}\n```\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    for option in command.params:
        record = option.get_help_record(context)  # with click's own account of default and range
        if isinstance(option, click.Option) and record is not None:
            yield f"- `{record[0]}`: {record[1]}"
    lines = ", a line each" if name == "tail" else ""
    yield f"\n`--json` prints `{command.prints.__name__}`{lines}.\n"


def _shapes() -> Iterator[str]:
    yield "## What --json prints\n"
    yield "```python"
    yield inspect.getsource(shapes).partition("TypedDict\n\n")[2].strip()
    yield "```"


def write() -> None:
    """Makes the page's generated part anew."""
    text = PAGE.read_text().partition(BEGIN)[0]
    PAGE.write_text(text + BEGIN + rendered())


if __name__ == "__main__":
    write()
