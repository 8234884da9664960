"""What a shop's worker is started with: ``celery -A tests.support.shop_worker worker``."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.shop import READY, open_shop, tell_ready

shop = open_shop(os.environ)
app = shop.app
tell_ready(Path(os.environ[READY]))
