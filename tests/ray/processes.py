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


def titled(root: int, title: str) -> list[int]:
    """Descendants of ``root`` whose command line contains ``title``."""
    parent_of = parents()
    found = []
    for pid in parent_of:
        ancestor = pid
        while ancestor in parent_of and ancestor not in (root, 1):
            ancestor = parent_of[ancestor]
        if ancestor == root and title in command_line(pid):
            found.append(pid)
    return sorted(found)


def command_line(pid: int) -> str:
    """Empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
    except OSError:
        return ""
