"""Host memory that processes beside this one can still get: the machine's, or less where a container has a limit.

A limit holds for a control group and all groups below it, so what is left is asked of this process's own group and of
each above it. Of what a group uses, the kernel takes back file pages that were not used lately (Kubernetes' working set
leaves them out, too); pages in ``/dev/shm`` are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# Files of limit and usage, and the line of memory.stat with the file pages to be had back; all of them with subgroups.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def available_bytes() -> int:
    """Return the memory that can still be had without swapping, within every limit on this process [bytes]."""
    left = [group_left for group, files in _memory_groups() if (group_left := _left_in(group, *files)) is not None]
    return max(0, min([psutil.virtual_memory().available, *left]))


def _memory_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of this process's group and of those above it, with the names of their files.

    In a container the path may be the host's: then only the topmost folder exists, and is the container's.
    """
    if not _MEMBERSHIP.exists():
        return  # not Linux
    for line in _MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (_CGROUPS / "memory", _V1) if controllers else (_CGROUPS, _V2)
        own = root / path.lstrip("/")
        yield from ((group, files) for group in (own, *own.parents) if group.is_relative_to(root))


def _left_in(group: Path, limit_file: str, usage_file: str, file_pages: str) -> int | None:
    """Return what a group may still take [bytes]; nothing if it has no limit, or isn't there."""
    if not (group / limit_file).exists():
        return None
    limit = (group / limit_file).read_text().strip()
    if limit == "max":
        return None
    used = int((group / usage_file).read_text())
    if (group / "memory.stat").exists():  # not in gVisor
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat[file_pages])
    return int(limit) - used
