"""benchmarks/gpu.py: a part that is done is not done again, one that failed or is another machine's is."""

from __future__ import annotations

import json
import sys

from benchmarks import gpu


def test_parts_are_done_once_and_the_page_has_them_all(tmp_path, monkeypatch):
    asked = []

    def run_part(name, place, seconds):
        asked.append(name)
        if name == "engines":
            return "it ended with exit code 1"
        record = {"machine": gpu.machine(), "seconds": 1.0, "figures": {"tokens/s": 1234.5, "kernel": "used"}}
        (place.folder / f"{name}.json").write_text(json.dumps(record))
        return None

    def page(*arguments: str) -> str:
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--shapes", "small", "--folder", str(tmp_path), *arguments])
        gpu.main()
        return (tmp_path / "small" / "gpu.md").read_text(encoding="utf-8")

    monkeypatch.setattr(gpu, "run_part", run_part)
    text = page("--parts", "head", "engines")
    assert asked == ["engines", "head"] and text.count("Left out: not asked for.") == len(gpu.PARTS) - 2
    assert "| tokens/s | 1,234 |" in text and "| kernel | used |" in text
    assert "Left out: it ended with exit code 1." in text
    page()
    assert asked == [name for name in gpu.PARTS if name != "head"]
    page()
    assert asked == ["engines"]
    parts = json.loads((tmp_path / "small" / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert parts["head"]["kernel"] == "used" and parts["engines"] == "it ended with exit code 1"
    monkeypatch.setattr(gpu, "machine", lambda: {"card": "another"})
    page("--parts", "head")
    assert asked == ["head"]


def test_a_part_is_ended_when_the_minutes_are_over(tmp_path):
    assert gpu.run_part("head", gpu.Place("small", tmp_path), 0.5) == "the minutes were over"
    assert not list(tmp_path.iterdir())
