"""What a shop's worker or beat is started with: ``celery -A tests.support.shop_worker worker``."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.shop import READY, USED_EARLY, open_shop, tell_ready, use_early
from tests.support.standstill import ARMED, arm

shop = open_shop(os.environ)
app = shop.app
if READY in os.environ:
    tell_ready(Path(os.environ[READY]))
if USED_EARLY in os.environ:
    use_early(shop.flows.store)
if ARMED in os.environ:
    arm(shop, Path(os.environ[ARMED]))
