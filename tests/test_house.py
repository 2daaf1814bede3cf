"""How the package is laid out: rooms whose imports point downwards, small files, and a public face that loads late."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import ROOT

PACKAGE = ROOT / "hapo_lite"
FLOORS = (
    "errors",
    "algo",
    "records",
    "recipe",
    "head",
    "tiny",
    "model",
    "runs",
    "tasks",
    "rollout",
    "train",
    "sft",
    "evaluate",
    "probe",
    "inspect",
    "compare",
    "export",
    "preflight",
    "replay",
    "verify_resume",
    "integrations",
)
"""Rooms and files, each of which imports only what stands before it. A room's `__main__` may also import `cli`."""


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file it does.

    The public face imports for type checkers what it loads late; that does not count.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = path == PACKAGE / "__init__.py"
    typing = [node for node in tree.body if late and ast.unparse(node).startswith("if TYPE_CHECKING")]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            both = [(node.module, f"{node.module}.{alias.name}") for alias in node.names]
            found |= {full if full in MODULES else module for module, full in both}
    return found & set(MODULES)


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A chain of modules that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def follow(module: str, chain: list[str]) -> list[str]:
        if module in chain:
            return [*chain[chain.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if found := follow(other, [*chain, module]):
                return found
        done.add(module)
        return []

    for module in imports:
        if found := follow(module, []):
            return found
    return []


def test_no_circle_of_imports():
    assert circle(IMPORTS) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_imports_point_downwards():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room_of(module) not in ("", "cli") and room_of(other) not in ("", room_of(module))
        if not (module.endswith(("__main__", ".child")) and room_of(other) == "cli")
        if room_of(other) == "cli" or FLOORS.index(room_of(other)) > FLOORS.index(room_of(module))
    ]
    assert not wrong


def test_the_entrance_is_small():
    entries = [entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 24  # 22 and two commands more
    assert sum(entry.is_file() for entry in entries) <= 6
    rooms = {entry.name for entry in entries if entry.is_dir()}
    assert rooms | {"errors", "records"} == set(FLOORS)
    for room in rooms:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))), room


def test_no_file_is_longer_than_400_lines():
    files = [path for folder in ("hapo_lite", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_public_face_loads_late_and_is_whole():
    script = (
        "import sys, hapo_lite\n"
        "assert 'torch' not in sys.modules\n"
        "import hapo_lite.train.run, hapo_lite.evaluate.evaluation\n"
        "for name in hapo_lite.__all__:\n"
        "    found = getattr(hapo_lite, name)\n"
        "    assert name == '__version__' or callable(found), name\n"
        "from hapo_lite import train, evaluate, EncodedPrompt, GraderPool\n"
        "assert callable(train) and callable(evaluate) and 'nothing' not in dir(hapo_lite)\n"
        "try:\n"
        "    hapo_lite.nothing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'hapo_lite' has no attribute 'nothing'\n"
