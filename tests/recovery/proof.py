"""What is told apart: a fault that did not strike is no figure, and neither is a promise that was broken."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class NotStruck(Exception):
    """The fault did not happen, so that nothing was measured; says what is missing."""


class Broken(Exception):
    """The fault happened, and something that must hold does not; says what."""


@contextmanager
def proof(what: str) -> Iterator[None]:
    """What is asserted inside proves that the fault struck.

    Raises:
        NotStruck: it does not.
    """
    try:
        yield
    except AssertionError as error:
        raise NotStruck(f"no proof that {what}: {said(error)}") from error


@contextmanager
def promise(what: str) -> Iterator[None]:
    """What is asserted inside must hold after the fault.

    Raises:
        Broken: it does not.
    """
    try:
        yield
    except AssertionError as error:
        raise Broken(f"{what}: {said(error)}") from error


def said(error: AssertionError) -> str:
    """The assertion's message, else its line."""
    line: str = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return str(error).partition("\n")[0] or line.removeprefix("assert ")
