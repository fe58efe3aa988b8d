from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest

from gspo_moe.errors import DataError
from gspo_moe.observability.jsonl import JsonLines, read_json_lines

FIVE_STEPS = b"".join(b'{"step": %d, "x": 0.1}\n' % step for step in (0, 1, 2, 2, 3))


def _resume(path: Path, step: int) -> bytes:
    JsonLines(path, step).close()
    return path.read_bytes()


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "a.jsonl", 0)
    lines.append({"step": 1, "text": "é\n", "x": 0.1})
    assert (tmp_path / "new" / "a.jsonl").read_bytes() == '{"step": 1, "text": "é\\n", "x": 0.1}\n'.encode()


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 2), (2, 4), (3, 5), (9, 5)])
def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path, step: int, kept: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(FIVE_STEPS)
    assert _resume(path, step) == b"".join(FIVE_STEPS.splitlines(keepends=True)[:kept])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(1, len(b'{"step": 3, "x": 0.1}\n')))
def test_a_line_torn_anywhere_is_cut_and_writing_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(FIVE_STEPS[:-cut])
    whole = cut == 1
    records, problems = read_json_lines(path)
    assert [record["step"] for record in records] == [0, 1, 2, 2] + [3] * whole
    assert len(problems) == (0 if whole else 1)
    lines = JsonLines(path, 3)
    lines.append({"step": 4, "x": 0.1})
    expected = [*FIVE_STEPS.splitlines(keepends=True)[: 5 if whole else 4], b'{"step": 4, "x": 0.1}\n']
    assert path.read_bytes() == b"".join(expected)


def test_a_torn_last_line_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "é'.encode()[:-1])
    records, problems = read_json_lines(path)
    assert records == [{"step": 1}]
    assert "line 2" in problems[0]
    assert "torn" in problems[0]


@pytest.mark.parametrize("middle", [b"{", b"", b"3", b'{"x": 1}', b'{"step": "1"}', b"\xff"])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, middle: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n' + middle + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        read_json_lines(path)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        JsonLines(path, 1)


def test_lines_that_a_disk_does_not_take_wait_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit of the kernel's tears the second line as a full disk does."""
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path, 0)
    lines.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            for step in (2, 3):
                lines.append({"step": step})
            with pytest.raises(OSError, match="File too large"):
                lines.flush()
            assert path.read_bytes() == b'{"step": 1}\n{"ste'
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("kept in memory until") == 1
    lines.append({"step": 4})
    lines.flush()
    assert path.read_bytes() == b"".join(b'{"step": %d}\n' % step for step in (1, 2, 3, 4))
    assert not lines.is_gone()
    path.rename(tmp_path / "b.jsonl")
    assert lines.is_gone()
    lines.close()
