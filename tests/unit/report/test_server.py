from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.errors import ConfigError
from gspo_moe.report.server import ReportServer
from tests.runs import write_run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReportServer]:
    write_run(tmp_path / "run", lambda step: {"reward/mean": 0.1 * step}, steps=range(1, 4))
    with ReportServer([tmp_path / "run"], 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _get(server: ReportServer, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.status, answer.read().decode()
    connection.close()
    return content


def _parts(server: ReportServer, version: str = "") -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(_get(server, f"/parts?version={version}")[1])
    return parts


def _last_reward(parts: dict[str, Any]) -> float:
    return float(parts["data"]["figures"][0]["panels"][0]["curves"][0]["raw"][-1])


def test_the_page_follows_the_run(server: ReportServer) -> None:
    status, page = _get(server, "/")
    assert (status, 'data-watch="parts"' in page, "connect-src &#39;self&#39;" in page) == (200, True, True)
    first = _parts(server)
    assert _last_reward(first) == pytest.approx(0.3)
    assert _parts(server, first["version"]) == {"version": first["version"]}
    metrics = server.paths[0] / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "reward/mean": 0.75}\n')
    second = _parts(server, first["version"])
    assert _last_reward(second) == 0.75
    metrics.write_text("broken\nbroken\n")
    assert "is not JSON" in _parts(server, second["version"])["problem"]


def test_it_serves_this_machine_alone(server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert _get(server, "/parts", Host="evil.example")[0] == 403
    assert _get(server, "/parts", Host="localhost:80")[0] == 200
    assert _get(server, "/../metrics.jsonl")[0] == 404


def _raw(server: ReportServer, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


@pytest.mark.parametrize("request_line", ["GET / HTTP/1.1\r\nHost: [", "GET http://[ HTTP/1.1\r\nHost: localhost"])
def test_what_is_no_address_is_a_bad_request(
    request_line: str, server: ReportServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _raw(server, f"{request_line}\r\n\r\n".encode()).startswith(b"HTTP/1.0 400 ")
    assert capsys.readouterr() == ("", "")


def test_clients_that_leave_are_no_error(
    server: ReportServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = threading.Event()

    def page(self: ReportServer) -> str:
        left.wait(30)
        return "x" * 10_000_000

    monkeypatch.setattr(ReportServer, "page", page)
    client = socket.create_connection(("127.0.0.1", server.server_address[1]))
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    # Closed so that the kernel answers what is written with a reset.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    left.set()
    _wait_for_threads(server)
    assert capsys.readouterr() == ("", "")


def test_clients_that_say_nothing_are_left_after_a_while(
    server: ReportServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gspo_moe.report.server._Handler.timeout", 0.05)
    silent = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(8)]
    for number, client in enumerate(silent):
        client.sendall(b"GET / HT" * (number % 2))
        assert client.recv(1) == b""
        client.close()
    _wait_for_threads(server)
    assert capsys.readouterr() == ("", "")


def test_a_damaged_run_is_told_and_no_stack_trace(server: ReportServer, capsys: pytest.CaptureFixture[str]) -> None:
    (server.paths[0] / "metrics.jsonl").write_text("broken\nbroken\n")
    status, text = _get(server, "/")
    assert (status, "is not JSON" in text) == (503, True)
    assert capsys.readouterr() == ("", "")


def _wait_for_threads(server: ReportServer) -> None:
    """Until no request is being answered."""
    until = time.monotonic() + 30
    while [one for one in threading.enumerate() if "process_request_thread" in one.name]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_taken_port_is_named(server: ReportServer) -> None:
    with pytest.raises(ConfigError, match=r"--port \d+: .*choose another port"):
        ReportServer(server.paths, server.server_address[1])


def test_the_command_ends_cleanly_at_ctrl_c(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lambda step: {"reward/mean": 0.5}, steps=range(1, 4))
    command = [sys.executable, "-m", "gspo_moe", "report", "--watch", str(run), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # What a shell starts in its background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "report: ended\n", "")
