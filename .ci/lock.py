"""`make lock` writes requirements.lock from requirements.txt, with the SHA-256 of every file as pip reports them.

The lock is for the Python and the platform that run this; an argument names a report of `pip install --report` for
another. uv pip compile is faster, but lists the hashes of every platform's files: thirteen times as many lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# Every package with the SHA-256 of its file, for {platform} and Python {python}; `make lock` writes it anew.
# pip install --require-hashes -r requirements.lock
"""


def report() -> Path:
    """The file with pip's report of what it would install into an empty environment."""
    path = Path(tempfile.mkdtemp(prefix="hapo-lock-")) / "report.json"
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    subprocess.run([*command, "-r", ROOT / "requirements.txt", "--report", path], check=True)
    return path


def locked(path: Path) -> str:
    """The text of the lock file for a report."""
    found = json.loads(path.read_text(encoding="utf-8"))
    where = found["environment"]
    lines = []
    for package in found["install"]:
        about = package["metadata"]
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{about['name'].lower().replace('_', '-')}=={about['version']} \\\n    --hash=sha256:{digest}\n")
    platform = f"{where['platform_system']} {where['platform_machine']}"
    return HEADER.format(platform=platform, python=where["python_version"]) + "".join(sorted(lines))


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else report()
    (ROOT / "requirements.lock").write_text(locked(chosen), encoding="utf-8")
