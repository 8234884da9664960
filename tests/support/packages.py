"""Folders of installed packages, made up: small distributions with METADATA and RECORD, as pip leaves them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Adds a distribution with these files."""
    record = []
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        record.append(f"{path},sha256={digest_of(content)},{len(content)}")
    about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    (about / "METADATA").write_text(metadata)
    record.append(f"{about.name}/METADATA,sha256={digest_of(metadata.encode())},{len(metadata)}")
    (about / "RECORD").write_text("\n".join([*record, f"{about.name}/RECORD,,"]) + "\n")


def digest_of(content: bytes) -> str:
    """SHA-256 as a RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def install_many(folder: Path, count: int) -> list[str]:
    """Adds so many distributions, each of a package with two modules and a larger file; gives their names."""
    names = [f"made-up-{number:02}" for number in range(count)]
    for number, name in enumerate(names):
        package = name.replace("-", "_")
        files = {
            f"{package}/__init__.py": f'"""Package {number}."""\n'.encode(),
            f"{package}/module.py": b"answer = 42\n",
            f"{package}/table.bin": bytes([number]) * 1_000_000,
        }
        install(folder, name, files)
    return names
