from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from trtllm_ct.base.memory_budget import available_memory

if TYPE_CHECKING:
    from pathlib import Path

MEMINFO = "MemTotal:        8000 kB\nMemAvailable:    4000 kB\n"


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_result_is_none_when_nothing_can_be_read(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_the_machine_is_the_limit_when_no_group_has_one(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.current": "5\n",
        },
    )

    assert available_memory(root) == 4000 * 1024


def test_the_tightest_parent_group_is_the_limit(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/job/memory.max": "3000\n",
            "sys/fs/cgroup/slice/job/memory.current": "1000\n",
            "sys/fs/cgroup/slice/memory.max": "2500\n",
            "sys/fs/cgroup/slice/memory.current": "1000\n",
        },
    )

    assert available_memory(root) == 1500


def test_file_cache_that_can_be_dropped_is_available(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "3000\n",
            "sys/fs/cgroup/memory.current": "2900\n",
            "sys/fs/cgroup/memory.stat": "anon 100\ninactive_file 700\nactive_file 5\n",
        },
    )

    assert available_memory(root) == 800


def test_cgroup_version_1_has_its_own_file_names(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n5:cpu,memory:/pod/job\n0::/\n",
            "sys/fs/cgroup/memory/pod/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/pod/job/memory.usage_in_bytes": "10\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n",
        },
    )

    assert available_memory(root) == 1030


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "3000\n",
            "sys/fs/cgroup/memory.current": "3500\n",
        },
    )

    assert available_memory(root) == 0


@pytest.mark.parametrize("cgroup", ["0::/../../elsewhere\n", "nonsense\n", "\n"])
def test_a_group_that_is_not_visible_is_ignored(tmp_path: Path, cgroup: str) -> None:
    root = write_files(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup})

    assert available_memory(root) == 4000 * 1024
