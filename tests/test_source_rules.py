"""What no file of ours may do, read off its syntax: run text as code, start a shell, unpickle, trust what it loads."""

from __future__ import annotations

import ast
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
SAFE_YAML = {"_StrictLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}
TOLD = {"False", "trust", "recipe.model.trust_remote_code", "settings.trust_remote_code"}
"""What may stand behind trust_remote_code: the recipe, which origins.may_run_code has been asked about."""
OURS = [ROOT / "app.py", *(p for d in ("hapo_lite", "benchmarks", "notebooks") for p in (ROOT / d).rglob("*"))]
SOURCES = sorted(path for path in OURS if path.suffix in (".py", ".ipynb"))


def source_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def broken_rules(source: str) -> Iterator[str]:
    """A clause for each place that breaks a rule, with its line."""
    for node in ast.walk(ast.parse(source)):
        for rule in broken_by(node):
            yield f"line {node.lineno}: {rule}"


def broken_by(node: ast.AST) -> Iterator[str]:
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    if any(module.split(".")[0] in PICKLES for module in modules):
        yield "imports a module that unpickles"
    if any(module in SHELLS for module in modules):
        yield "imports what starts a shell"
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                yield from not_told(ast.unparse(value))
    if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "'trust_remote_code'":
        yield "trusts code that the recipe did not name"
    if isinstance(node, ast.Call):
        yield from broken_by_call(ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords})


def broken_by_call(called: str, options: dict[str | None, str]) -> Iterator[str]:
    owner, _, name = called.rpartition(".")
    if called in {"eval", "exec", "compile", "__import__"} or owner == "builtins":
        yield "runs text as code"
    if called in SHELLS or name.startswith("create_subprocess_shell") or options.get("shell", "False") != "False":
        yield "starts a shell"
    if called in {"torch.load", "load_state_dict_from_url"} and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if options.get("allow_pickle", "False") != "False":
        yield "numpy may unpickle"
    if (
        owner == "yaml"
        and "load" in name
        and not name.startswith("safe_load")
        and options.get("Loader") not in SAFE_YAML
    ):
        yield "YAML that makes any object"
    yield from not_told(options.get("trust_remote_code", "False"))
    if name == "from_pretrained":
        models = owner.startswith("AutoModel") or "ForCausalLM" in owner
        if models and options.get("use_safetensors") != "True":
            yield "a model without use_safetensors=True"


def not_told(trust: str) -> Iterator[str]:
    if trust not in TOLD:
        yield "trusts code that the recipe did not name"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_ours_breaks_a_rule(path):
    assert not list(broken_rules(source_of(path)))


def test_adapters_are_loaded_in_one_place_which_looks_for_safetensors_first():
    found = set()
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(source_of(path))) if isinstance(n, ast.Attribute)]
        found |= {path for n in calls if n.attr == "from_pretrained" and "Peft" in ast.unparse(n.value)}
    assert found == {ROOT / "hapo_lite" / "model" / "adapter.py"}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("eval(input())", "runs text as code"),
        ("exec(open('x').read())", "runs text as code"),
        ("import builtins\nbuiltins.exec('1')", "runs text as code"),
        ("os.system('ls')", "starts a shell"),
        ("from os import system", "imports what starts a shell"),
        ("subprocess.run(f'ls {x}', shell=True)", "starts a shell"),
        ("import pickle", "imports a module that unpickles"),
        ("from joblib import load", "imports a module that unpickles"),
        ("def f():\n    import dill as d", "imports a module that unpickles"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "numpy may unpickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "YAML that makes any object"),
        ("yaml.unsafe_load(text)", "YAML that makes any object"),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=True)", "trusts code that the recipe did not name"),
        ("f(**{'trust_remote_code': True})", "trusts code that the recipe did not name"),
        ("options['trust_remote_code'] = x", "trusts code that the recipe did not name"),
        ("AutoModelForCausalLM.from_pretrained(x)", "a model without use_safetensors=True"),
        ("Qwen2ForCausalLM.from_pretrained(x, use_safetensors=False)", "a model without use_safetensors=True"),
    ],
)
def test_every_rule_finds_what_breaks_it(source, rule):
    assert [found.partition(": ")[2] for found in broken_rules(source)] == [rule]


def test_what_is_allowed_breaks_no_rule():
    allowed = (
        "re.compile(x); torch.compile(f); model.eval(); yaml.load(t, Loader=yaml.SafeLoader); yaml.safe_load(t)\n"
        "torch.load(p, weights_only=True); subprocess.run(['ls'], shell=False); json.load(f)\n"
        "AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=False)\n"
    )
    assert not list(broken_rules(allowed))


def test_a_notebook_is_read_cell_by_cell(tmp_path):
    cells = [
        {"cell_type": "code", "source": ["!pip install x\n", "%matplotlib inline\n", "x = 1\n"]},
        {"cell_type": "markdown", "source": ["import pickle"]},
        {"cell_type": "code", "source": ["import pickle"]},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert list(broken_rules(source_of(tmp_path / "n.ipynb"))) == ["line 5: imports a module that unpickles"]


def test_every_package_that_is_imported_is_declared():
    """So that `pip install .` brings all that a command needs; extras are named in pyproject.toml too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w-]+", line).group().lower().replace("-", "_") for line in wanted}
    by_module = {"yaml": "pyyaml", "transfer_queue": "verl"}
    hosts = {"verl", "triton"}  # what the kit is a plug-in of, and what a CUDA build of torch brings
    imported = {
        module.split(".")[0]
        for path in [ROOT / "app.py", *(ROOT / "hapo_lite").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    others = imported - sys.stdlib_module_names - {"hapo_lite", "__future__"}
    assert len(others) > 15
    assert {by_module.get(module, module).lower() for module in others} - declared - hosts == set()
