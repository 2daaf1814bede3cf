"""The notebooks, cell by cell in a kernel of their own: nothing in them may fail, and they show what they promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = ROOT / "notebooks"
SMALL = [
    "rollout.prompts_per_iteration=4",
    "rollout.completions_per_prompt=4",
    "training.iterations=2",
    "evaluation.prompts=2",
    "evaluation.samples=2",
    "reward.workers=1",
    "logging.progress=false",
]


def run_notebook(name: str, monkeypatch, **parameters) -> nbformat.NotebookNode:
    """Execute a notebook with other values in its cell tagged parameters, and without its cells tagged install."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert set(parameters) <= set(re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE))
    cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}})
    return client.execute()


def shown(notebook: nbformat.NotebookNode, after: str, kind: str = "text") -> str:
    """What the cells whose source holds `after` printed, or displayed as `kind`."""
    out = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and after in cell.source:
            for output in cell.outputs:
                out.append(output.get("text", "") if kind == "text" else output.get("data", {}).get(kind, ""))
    return "".join(out)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert len(cell["source"]) <= 25


def test_the_quickstart_trains_and_shows(tmp_path, monkeypatch):
    done = run_notebook(
        "quickstart.ipynb", monkeypatch, OVERRIDES=[f"output_dir={tmp_path}", *SMALL, "benchmark.limit=2"]
    )
    printed = shown(done, "train(recipe)")
    assert "hapo on tiny" in printed and re.search(r"held-out accuracy, avg@2 +0\.\d+ +[01]\.\d+", printed)
    assert shown(done, "curves.png", "image/png")
    assert re.search(r"avg@8 .* on 2 prompts", shown(done, "evaluate(few)"))
    for view in ("inline.completion(run)", "inline.right_against_wrong("):
        html = shown(done, view, "text/html")
        assert "iframe srcdoc" in html and "hapo-tokens" in html
    served = shown(done, "app.serve", "text/html") + shown(done, "app.serve")
    assert re.search(r"<iframe src=\"?http://127\.0\.0\.1:\d+", served) and "gradio.live" not in served
    assert (tmp_path / "tiny_cpu" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_colab_notebook_with_the_bundled_model_in_place_of_qwen(tmp_path, monkeypatch):
    done = run_notebook(
        "colab_qwen1_5b.ipynb",
        monkeypatch,
        RECIPE="recipes/tiny_cpu.yaml",
        OVERRIDES=[f"output_dir={tmp_path}", *SMALL, "benchmark.samples=2"],
        SUITE="tiny",
        LIMIT=4,
    )
    for command, promised in (
        ("hapo_lite.preflight", "GiB"),
        ("hapo_lite.train", r"held-out accuracy, avg@2 +0\.\d+ +[01]\.\d+"),
        ("hapo_lite.evaluate", r"avg@2 +[01]\.\d+ .*\n[^$]*on 4 prompts"),
        ("hapo_lite.export", r"adapter: README\.md, adapter_config\.json"),
    ):
        printed = shown(done, command)
        assert re.search(promised, printed) and not re.search("error|Traceback", printed), printed
    assert shown(done, "curves.png", "image/png")
    assert "hapo-tokens" in shown(done, "inline.completion(run)", "text/html")
    assert (tmp_path / "tiny_cpu" / "export" / "adapter" / "README.md").is_file()
