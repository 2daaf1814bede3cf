"""Completions to be graded, and the processes that grade them."""

from __future__ import annotations

import os
import subprocess


def box(answer: str) -> str:
    return rf"Therefore \boxed{{{answer}}}."


def children() -> set[int]:
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if "_grader" in line}
