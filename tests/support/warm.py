"""A process that has Celery's command line imported, and forks for each command: a second of imports saved, each time.

What runs is Celery's own entry point, in a process of its own with its own folder, environment and output; the imports
make no app and open nothing, which tests/unit/test_front_door.py proves.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.support.commandline import ROOT, environment

PRELOADED = (
    "celery.bin.celery", "celery.apps.worker", "kombu.transport.memory", "kombu.transport.redis",
    "sqlalchemy.dialects.sqlite", "psycopg", "celery_flows.worker.cli",
)  # fmt: skip


class WarmCelery:
    """Runs ``celery …`` commands, one after the other."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.support.warm"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=30)  # the end of its input is the end of it
        assert self._server.returncode == 0

    def run(
        self, arguments: Sequence[str], folder: Path, settings: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``celery`` with these arguments to its end."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as outputs:
            paths = [Path(outputs, name) for name in ("stdout", "stderr")]
            request = {
                "arguments": list(arguments), "folder": str(folder), "environment": environment(**settings),
                "outputs": [str(path) for path in paths],
            }  # fmt: skip
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            out, err = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(["celery", *arguments], code, out, err)


def serve() -> None:
    """Forks for each request on standard input, and answers with the exit code."""
    for module in PRELOADED:
        __import__(module)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            leave(become(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


def become(request: dict[str, Any]) -> int:
    """Turns this process into the one that was asked for, runs the command, and gives its exit code."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    files = [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(p, os.O_WRONLY | os.O_CREAT, 0o600) for p in request["outputs"]),
    ]
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.argv = ["celery", *request["arguments"]]
    sys.path[0] = request["folder"]  # as with python -m
    try:
        runpy.run_module("celery", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """Ends this process as the interpreter does, but for taking modules apart, which takes longer than the command."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
