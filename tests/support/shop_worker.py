"""What a shop's worker or beat is started with: ``celery -A tests.support.shop_worker worker``."""

from __future__ import annotations

import os
from pathlib import Path

from celery_flows.logs import use_flow_logging
from tests.support.shop import JSON_LOG, READY, USED_EARLY, open_shop, tell_ready, use_early
from tests.support.standstill import ARMED, arm
from tests.support.tracing import INSTRUMENTED, SPANS, write_spans

shop = open_shop(os.environ)
app = shop.app
if READY in os.environ:
    tell_ready(Path(os.environ[READY]))
if USED_EARLY in os.environ:
    use_early(shop.flows.store)
if JSON_LOG in os.environ:
    use_flow_logging(app, "json")
if SPANS in os.environ:
    write_spans(os.environ[SPANS], instrumented=INSTRUMENTED in os.environ)
if ARMED in os.environ:
    arm(shop, Path(os.environ[ARMED]))
