"""What the soak's workers and beats are started with: ``celery -A tests.soak.program``."""

from __future__ import annotations

import os

from tests.soak.flows import open_application

app = open_application(os.environ).app
