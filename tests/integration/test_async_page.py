"""docs/guide/async.md does what it says: its agent asks a server that answers only when all ask at once."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.bench import Bench

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "async.md"
PARTS = [f"part-{number}" for number in range(12)]


class Model(ThreadingHTTPServer):
    """A model of somebody's. It answers searches when it has all of them: those who ask one by one wait for ever."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.all_are_here = threading.Barrier(len(PARTS), timeout=10)
        self.asked: Counter[str] = Counter()


class Answer(BaseHTTPRequestHandler):
    server: Model

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        [question] = parse_qs(url.query)["q"]
        self.server.asked[url.path] += 1
        if url.path == "/search":
            with suppress(threading.BrokenBarrierError):
                self.server.all_are_here.wait()
            if self.server.all_are_here.broken or question == "part-3":
                self.send_error(503)
                return
        answers = {"/plan": " ".join(PARTS), "/search": question.upper(), "/sum-up": f"all of {question}"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answers[url.path].encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def model() -> Iterator[Model]:
    with Model() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        yield server
        server.shutdown()
        serving.join()


def test_the_agent_of_the_page_asks_for_all_parts_at_once(bench: Bench, model: Model) -> None:
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    block = block.replace("Retry(max_attempts=3)", "Retry(max_attempts=1)")  # the barrier opens for one crowd only
    names: dict[str, Any] = {
        "flows": bench.flows, "timedelta": timedelta, "MODEL": f"http://127.0.0.1:{model.server_port}"
    }  # fmt: skip
    exec(compile(block, str(PAGE), "exec"), names)
    found = " ".join(part.upper() for part in PARTS if part != "part-3")
    assert bench.finish(names["research"].start("why"), seconds=30) == f"all of {found}"
    assert model.asked == {"/plan": 1, "/search": len(PARTS), "/sum-up": 1}
