"""What the command line shows: tables on a terminal, plain columns in a pipe, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from celery_flows.store.engines import parse_url

if TYPE_CHECKING:
    from rich.table import Table

# What a status looks like on a terminal, of a flow or of a step.
STYLES = {
    "created": "cyan", "pending": "cyan", "running": "bold cyan", "waiting": "blue", "finished": "green",
    "succeeded": "green", "failed": "bold red", "cancelled": "yellow",
}  # fmt: skip


def show_json(value: Any, *, line: bool = False) -> None:
    """One JSON document on standard output, on a line of its own if ``line``; times are ISO 8601 in UTC."""
    indent = 2 if sys.stdout.isatty() and not line else None
    click.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=indent))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, UUID | StrEnum):
        return str(value)
    raise TypeError(type(value).__name__)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; in a pipe, a line a row, its cells parted by tabs, so that nothing is cut."""
    texts = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        lines = _drawn(columns, texts)
        title = title and click.style(title, bold=True)
    else:
        lines = ["\t".join(row) for row in [columns, *texts]]
    click.echo("\n".join([title, *lines] if title else lines))


def show_row(cells: Sequence[object], widths: Sequence[int]) -> None:
    """A row of a table that has no end yet: on a terminal its cells are as wide as said, or as they have to be."""
    texts = ["" if cell is None else printable(str(cell)) for cell in cells]
    if not sys.stdout.isatty():
        click.echo("\t".join(texts))
        return
    head = [_styled(text, width) for text, width in zip(texts, widths, strict=False)]
    click.echo("  ".join([*head, *texts[len(head) :]]).rstrip())


def _styled(text: str, width: int) -> str:
    from rich.cells import cell_len
    from rich.color import ColorSystem
    from rich.style import Style

    padded = text + " " * (width - cell_len(text))
    is_plain = _wants_no_color() or os.environ.get("NO_COLOR")
    return padded if is_plain else Style.parse(_style(text)).render(padded, color_system=ColorSystem.STANDARD)


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """No frame, nothing folded: on a narrow terminal a long row runs on, and what is copied from it is whole."""
    # Imported when it is needed: every `celery` command imports this file.
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text.assemble((cell, _style(cell))) for cell in row))
    console = Console(highlight=False, no_color=_wants_no_color())
    unbounded = console.options.update(max_width=1_000_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    with console.capture() as drawn:
        console.print(table)
    return [line.rstrip() for line in drawn.get().splitlines()]


def _style(cell: str) -> str:
    """Of a status (also ``running, paused``), or of an event that says that one was come to (``step_failed``)."""
    return STYLES.get(cell.removeprefix("step_").partition(",")[0], "")


def _wants_no_color() -> bool | None:
    """Whether ``celery --no-color`` was said; None: what the environment says."""
    context = click.get_current_context(silent=True)
    return True if context is not None and context.find_root().params.get("no_color") else None


def printable(text: str) -> str:
    """One line that does nothing to a terminal, whatever somebody wrote into a flow."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def masked(url: str) -> str:
    """A database's URL without password and options, which may be secret."""
    return parse_url(url).set(query={}).render_as_string(hide_password=True)


def moment(at: datetime | None) -> str | None:
    """A time in UTC, to the millisecond; as it is shown, it can be given to a command."""
    return None if at is None else at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
