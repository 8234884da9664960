"""Fixtures for the tests of the engine, in this process and over each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.bench import Bench, opened


@pytest.fixture
def bench(database_url: str) -> Iterator[Bench]:
    """Flows over each database; after the test every history must be whole."""
    yield from opened(database_url)
