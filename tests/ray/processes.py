"""Processes below a given one, by what they call themselves."""

from __future__ import annotations

from pathlib import Path


def parents() -> dict[int, int]:
    """Parent of every process there is."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold spaces and brackets.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        found[int(stat.parent.name)] = int(fields[1])
    return found


def below(root: int) -> list[int]:
    """Descendants of ``root``, and it itself."""
    parent_of = parents()
    found = []
    for pid in parent_of:
        ancestor = pid
        while ancestor in parent_of and ancestor not in (root, 1):
            ancestor = parent_of[ancestor]
        if ancestor == root:
            found.append(pid)
    return sorted(found)


def titled(root: int, title: str) -> list[int]:
    """Descendants of ``root`` whose command line contains ``title``."""
    return [pid for pid in below(root) if pid != root and title in command_line(pid)]


def command_line(pid: int) -> str:
    """Empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
    except OSError:
        return ""


def environment_of(pid: int) -> str:
    """The variables that a process was started with; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8", errors="replace").replace("\0", "\n")
    except OSError:
        return ""
