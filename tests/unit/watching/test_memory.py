"""What a process may still take: by its cgroups, of both versions, and its own limits."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from gspo_moe.watching import memory
from gspo_moe.watching.memory import cgroup_rooms, free_memory


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_each_cgroup_with_a_limit_counts_without_files_that_it_can_give_up(tmp_path: Path) -> None:
    second = {
        "own": "0::/job/step\n",
        "job/memory.max": "9000", "job/memory.current": "5000",
        "job/memory.stat": "anon 3000\ninactive_file 1500\nactive_file 400\n",
        "job/step/memory.max": "max\n", "job/step/memory.current": "10", "job/step/memory.stat": "",
    }  # fmt: skip
    root = tree(tmp_path / "two", second)
    assert list(cgroup_rooms(root, root / "own")) == [9000 - 5000 + 1900]
    first = {
        "own": "7:cpu,cpuacct:/x\n4:memory:/docker/0123\n1:name=systemd:/\n",
        "memory/memory.limit_in_bytes": "7000", "memory/memory.usage_in_bytes": "6000",
        "memory/memory.stat": "cache 500\ntotal_inactive_file 300\ninactive_file 200\n",
    }  # fmt: skip
    root = tree(tmp_path / "one", first)  # a container, which sees its own cgroup as the root
    assert list(cgroup_rooms(root, root / "own")) == [1300]
    assert list(cgroup_rooms(root, root / "none")) == []


@pytest.mark.parametrize(("kind", "held"), [(resource.RLIMIT_DATA, "data"), (resource.RLIMIT_AS, "vms")])
def test_half_of_what_a_ulimit_leaves_is_free(kind: int, held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = getattr(psutil.Process().memory_info(), held)
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (now + (1 << 28), -1) if asked == kind else infinite)
    monkeypatch.setattr(memory, "cgroup_rooms", list)
    assert free_memory("cpu") == pytest.approx(1 << 27, abs=1 << 25)
