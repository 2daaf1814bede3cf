"""The recipes that are shipped, and the least that is one."""

from __future__ import annotations

import yaml

from tests.conftest import ROOT

FILES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")
COMPARISONS = [p for p in FILES if "arms" in yaml.safe_load(p.read_text(encoding="utf-8"))]
SHIPPED = [p for p in FILES if p not in COMPARISONS]
MINIMAL = {"model": {"name": "tiny"}, "data": {"source": "tiny"}, "training": {"iterations": 1}}
