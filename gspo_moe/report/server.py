"""`gspo-moe report --watch`: serves the page on this machine alone and lets it follow a run that goes on."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gspo_moe.errors import ConfigError, GspoMoeError
from gspo_moe.report.collect import collect
from gspo_moe.report.page import page_parts, render_page

ADDRESS = "127.0.0.1"
PATIENCE_SECONDS = 10.0  # with a client that says nothing, or does not take what it asked for
WATCHED = (
    "metrics.jsonl",
    "samples.jsonl",
    "starts.jsonl",
    "config.yaml",
    "summary.json",
    "routing_layers.safetensors",
)


class ReportServer(ThreadingHTTPServer):
    """GET / is the page, GET /parts?version=V what changed since version V. port 0 takes a free one.

    Raises ConfigError when the port is taken, DataError when `paths` hold no run.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, paths: Sequence[str | Path], port: int) -> None:
        if not 0 <= port < 1 << 16:
            raise ConfigError(f"--port {port} is no port; choose one from 1 to 65535, or 0 for a free one")
        self.paths = [Path(path) for path in paths]
        collect(self.paths)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; choose another port, 0 for a free one") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the midst of an answer are nobody's mistake; anything else is told as ever."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def version(self) -> str:
        """Changes whenever a file that the page shows does."""
        stamps = []
        for file in [file for path in self.paths for name in WATCHED for file in sorted(path.rglob(name))]:
            with contextlib.suppress(FileNotFoundError):  # a file being replaced
                stat = file.stat()
                stamps.append((str(file), stat.st_mtime_ns, stat.st_size))
        return f"{hash(tuple(stamps)):x}"

    def page(self) -> str:
        """Raises DataError while no run can be read."""
        return render_page(collect(self.paths), watch=True)

    def parts(self, seen: str) -> dict[str, Any]:
        """Body and data of the page, without them where `seen` is the present version or no run can be read."""
        version = self.version()
        if version == seen:
            return {"version": version}
        try:
            body, data = page_parts(collect(self.paths))
        except GspoMoeError as error:
            return {"version": seen, "problem": str(error)}
        return {"version": version, "body": body, "data": data}


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = PATIENCE_SECONDS

    def do_GET(self) -> None:
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            request = urlsplit(self.path)
        except ValueError:  # a bracket without its other half
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        # A page elsewhere whose name resolves to this machine must not read the runs.
        if host not in (ADDRESS, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "open the report by 127.0.0.1 or localhost")
            return
        if request.path == "/":
            try:
                self._answer("text/html", self.server.page())
            except GspoMoeError as error:
                self._answer("text/plain", str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        elif request.path == "/parts":
            seen = parse_qs(request.query).get("version", [""])[0]
            self._answer("application/json", json.dumps(self.server.parts(seen), allow_nan=False))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = text.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A line a request would bury the address that was printed."""


def serve(paths: Sequence[str | Path], port: int) -> None:
    """Serves until Ctrl-C."""
    with ReportServer(paths, port) as server:
        try:
            print(f"{server.url} follows {', '.join(map(str, server.paths))}; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("report: ended")
