"""
The control group (cgroup) of this process: the memory limit that Linux enforces for it.

Versions 1 and 2 are read, from the group of the process up to the highest visible one: the limit of each level applies.
File pages that the kernel can drop immediately count as free, as they do for the whole machine.

A system without control groups has no limit. Nothing here changes a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Version 1 writes a number near 2^63 where there is no limit.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The memory limit that applies to this process."""

    #: Bytes that the group may use.
    total: int
    #: Free bytes at the level that has the least.
    free: int
    #: The file that contains the limit.
    path: Path


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """The file names of one cgroup version."""

    limits: tuple[str, ...]
    usage: str
    #: The key in memory.stat of the pages that can be dropped.
    droppable_key: str


_V1 = _CgroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", "inactive_file")


def find(root: Path = Path("/")) -> MemoryLimit | None:
    """Returns the limit of this process, or None. /proc and the mounts are read below `root`."""
    limits = [limit for files, folders in _groups(root) for folder in folders if (limit := _read(folder, files))]
    if not limits:
        return None
    tightest = min(limits, key=lambda limit: limit.total)
    return MemoryLimit(tightest.total, min(limit.free for limit in limits), tightest.path)


def oom_kills(root: Path = Path("/")) -> int:
    """Returns how many processes the kernel has OOM-killed since the boot, in all groups of the machine."""
    lines = [line.split() for line in _text(root / "proc/vmstat").splitlines()]
    return next((int(line[1]) for line in lines if line[0] == "oom_kill"), 0)


def _groups(root: Path) -> list[tuple[_CgroupFiles, list[Path]]]:
    """Returns the folders of the own group and its parents, for each mounted version with a memory controller."""
    own = _text(root / "proc/self/cgroup").splitlines()
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        if kind == "cgroup2":
            files, group = _V2, next((entry.split(":", 2)[2] for entry in own if entry.startswith("0::")), None)
        elif kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            named = [entry.split(":", 2) for entry in own]
            files, group = _V1, next((parts[2] for parts in named if "memory" in parts[1].split(",")), None)
        else:
            continue
        if group is not None:
            top, mount = left.split(" ")[3:5]
            found.append((files, _group_and_parents(root / mount.lstrip("/"), group, top)))
    return found


def _group_and_parents(mount: Path, group: str, top: str) -> list[Path]:
    """Returns the folder of the group and its parents, up to the mount point."""
    try:
        below = PurePosixPath(group).relative_to(top)
    except ValueError:  # the group is outside of the mounted subtree: use the root of the mount
        below = PurePosixPath()
    folder = mount / below
    if ".." in below.parts or not folder.is_dir():
        folder = mount
    return [folder, *(parent for parent in folder.parents if parent == mount or mount in parent.parents)]


def _read(folder: Path, files: _CgroupFiles) -> MemoryLimit | None:
    limits = [(size, folder / name) for name in files.limits if (size := _number(folder / name)) is not None]
    limits = [(size, path) for size, path in limits if size < _UNLIMITED]
    if not limits:
        return None
    total, path = min(limits)
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    used = (_number(folder / files.usage) or 0) - int(stat.get(files.droppable_key, 0))
    return MemoryLimit(total, min(max(total - max(used, 0), 0), total), path)


def _number(path: Path) -> int | None:
    """Returns the number in the file; None for `max` and for a missing file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
