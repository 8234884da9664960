"""The work itself, without flows: distributions, their RECORDs, and the files that are there."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel

CHUNK_BYTES = 1024 * 1024


class Checked(TypedDict):
    """What came of one distribution; paths are relative to the folder."""

    name: str
    files: int
    bytes: int
    altered: list[str]
    missing: list[str]


class Report(BaseModel):
    """What came of all of them together."""

    folder: str
    distributions: int
    files: int
    bytes: int
    altered: list[str]
    missing: list[str]
    unlisted: list[str]


def packages_folder(environment: str | None) -> Path:
    """The folder of installed packages: of a virtual environment, the folder itself, or this Python's own.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if environment is None:
        return Path(sysconfig.get_paths()["purelib"])
    root = Path(environment).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{environment} is no folder")
    return next(iter(sorted(root.glob("lib/python*/site-packages"))), root)


def find_distributions(folder: Path) -> dict[str, Distribution]:
    """The distributions that are installed in this folder, with a RECORD, by name."""
    found: dict[str, Distribution] = {}
    for distribution in filter(_is_whole, distributions(path=[str(folder)])):
        found.setdefault(distribution.name, distribution)
    return found


def find_distribution(folder: Path, name: str) -> Distribution:
    """One of them.

    Raises:
        LookupError: it has been uninstalled meanwhile.
    """
    found = filter(_is_whole, distributions(name=name, path=[str(folder)]))
    for distribution in found:
        return distribution
    raise LookupError(f"{name} is no longer installed in {folder}")


def _is_whole(distribution: Distribution) -> bool:
    return bool(distribution.read_text("METADATA") and distribution.read_text("RECORD"))


def check(folder: Path, distribution: Distribution) -> Checked:
    """Compares each file of the distribution with its RECORD: is it there, of this size, with this hash?"""
    result = Checked(name=distribution.name, files=0, bytes=0, altered=[], missing=[])
    for path, digest, size in read_record(distribution):
        file = folder / path
        if not file.is_file():
            if digest:  # what has none is made at installation or at run time, and may be gone
                result["missing"].append(path)
            continue
        result["files"] += 1
        result["bytes"] += file.stat().st_size
        if (size and int(size) != file.stat().st_size) or (digest and digest != hash_of(file, digest)):
            result["altered"].append(path)
    return result


def read_record(distribution: Distribution) -> list[tuple[str, str, str]]:
    """The lines of a RECORD: path, hash and size; the latter two may be empty."""
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def hash_of(file: Path, recorded: str) -> str:
    """The file's hash, in the algorithm and form of the recorded one: ``sha256=<base64 without padding>``."""
    algorithm = recorded.partition("=")[0]
    digest = hashlib.new(algorithm)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return f"{algorithm}={base64.urlsafe_b64encode(digest.digest()).rstrip(b'=').decode()}"


def unlisted(folder: Path) -> list[str]:
    """The files below the folder that no RECORD lists; compiled ones, which Python makes itself, left out."""
    records = [read_record(distribution) for distribution in find_distributions(folder).values()]
    listed = {os.path.normpath(folder / path) for record in records for path, _, _ in record}
    files = (str(file) for file in folder.rglob("*") if file.suffix != ".pyc" and file.is_file())
    return sorted(os.path.relpath(file, folder) for file in files if os.path.normpath(file) not in listed)
