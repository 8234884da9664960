"""Parts of an object, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(whole: Any, **parts: Any) -> Iterator[None]:
    """Puts ``parts`` in the place of the object's own attributes of these names; afterwards they are as before."""
    own = vars(whole)
    before = {name: own[name] for name in parts if name in own}
    for name, part in parts.items():
        setattr(whole, name, part)
    try:
        yield
    finally:
        for name in parts:
            if name in before:
                setattr(whole, name, before[name])
            else:
                delattr(whole, name)


@contextmanager
def asked_anew(whole: Any, *names: str) -> Iterator[None]:
    """What the object keeps once it has been asked (``cached_property``) is asked anew, and forgotten afterwards; what
    it has kept from before, it has again then."""
    own = vars(whole)
    before = {name: own.pop(name) for name in names if name in own}
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)
