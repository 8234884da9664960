"""A shell completes commands, options, and the names of the app's flows."""

from __future__ import annotations

import pytest

from tests.support.commandline import CELERY, Project

LINES = {
    "celery -A shop flow start shop/d": ["shop/double"],
    "celery -A shop flow list --flow shop/h": ["shop/hello"],
    "celery -A shop flow cancel --flow late/": [],
    "celery -A late flow cancel --flow late/": ["late/hello"],
    "celery -A shop flow unp": ["unpause"],
    "celery -A shop flow list --status fi": ["finished"],
    "celery -A nowhere flow start sho": [],
    "celery flow start sho": [],
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_completed(line: str, project: Project) -> None:
    asked = {"_CELERY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}

    answered = project.but(**asked).run(
        CELERY[0], "-c", "import sys; sys.argv = ['celery']; from celery.__main__ import main; main()"
    )

    assert [word.partition(",")[2] for word in answered.stdout.split()] == LINES[line]
    assert answered.stderr == ""
