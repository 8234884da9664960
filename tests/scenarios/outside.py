"""What is outside of the flows: banks, hotels, mail. It does as a test says, and has a log of what was asked of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.support.effects import EffectLog

EFFECTS = "SCENARIO_EFFECTS"  # the log's path, in the environment of a worker


class Refused(Exception):
    """The outside does not do it."""


class Outside:
    """All services at once. What bears a key is done once, however often it is asked for."""

    def __init__(self) -> None:
        self._refusals: dict[str, int] = {}
        self._answers: dict[str, list[str]] = {}

    def begin(self, path: Path) -> None:
        """Forgets all, and logs to this file."""
        os.environ[EFFECTS] = str(path)
        self.__init__()  # type: ignore[misc]

    @property
    def log(self) -> EffectLog:
        return EffectLog(os.environ[EFFECTS])

    @property
    def held(self) -> Path:
        """While this file is there, whoever asks for what it names does not get away."""
        return self.log.path.with_name("held")

    @property
    def refused(self) -> Path:
        """Names what is refused to every process, if the file is there."""
        return self.log.path.with_name("refused")

    # ---- what a test says ----

    def refuse(self, what: str, *, times: int = 1000) -> None:
        """What begins like this is refused, so many times."""
        self._refusals[what] = times

    def refuse_everywhere(self, what: str) -> None:
        """As :meth:`refuse`, of other processes' steps too, and for good."""
        self.refused.write_text(what)

    def answer(self, what: str, *answers: str) -> None:
        """What begins like this is answered so, one after the other, and by the last of them from then on."""
        self._answers[what] = list(answers)

    @property
    def asked(self) -> list[str]:
        """All that was asked for, as often as it was, in order."""
        return [line["effect"] for line in self.log.read()]

    @property
    def done(self) -> list[str]:
        """What was done, in order."""
        lines = [line for line in self.log.read() if not line["refused"]]
        return list({line["key"] or number: line["effect"] for number, line in enumerate(lines)}.values())

    # ---- what a step does ----

    def ask(self, what: str, *, key: str = "") -> str:
        """Has it done, and gives the answer: what was asked for, where a test has said no other."""
        refused = self._is_refused(what)
        self.log.append(what, key=key, refused=refused)
        while self._is_held(what):
            time.sleep(0.02)
        if refused:
            raise Refused(what)
        answers: list[Any] = next((said for like, said in self._answers.items() if what.startswith(like)), [what])
        return str(answers.pop(0) if len(answers) > 1 else answers[0])

    def _is_held(self, what: str) -> bool:
        try:
            return what.startswith(self.held.read_text())
        except FileNotFoundError:
            return False

    def _is_refused(self, what: str) -> bool:
        if self.refused.exists() and what.startswith(self.refused.read_text()):
            return True
        for like, left in self._refusals.items():
            if left and what.startswith(like):
                self._refusals[like] -= 1
                return True
        return False


outside = Outside()
