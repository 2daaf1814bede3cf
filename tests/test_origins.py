"""Models from strangers: their code is not run unasked, and a hub name is pinned to the commit it stood for."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from hapo_lite.errors import UserError
from hapo_lite.evaluate.evaluation import evaluate
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL, folder_digest, model_origin
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.runs.checkpoint import read_record
from hapo_lite.train import run
from tests.rows import jsonl

COMMIT, LATER = "a1" * 20, "b2" * 20
CODE = """
import pathlib
from transformers import Qwen2Config, Qwen2ForCausalLM
pathlib.Path({marker!r}).touch()

class MarkedConfig(Qwen2Config):
    model_type = "marked"

class MarkedForCausalLM(Qwen2ForCausalLM):
    config_class = MarkedConfig
"""


def load(name, **changes):
    return load_policy(ModelSettings(name=str(name), lora=LoraSettings(rank=4, alpha=8.0), **changes), 0, "cpu")


def write_model(folder: Path, marker: Path, auto_map: dict | None = None) -> Path:
    """The bundled model as one that needs its own code, which leaves `marker` wherever it is imported."""
    shutil.copytree(TINY_MODEL, folder, dirs_exist_ok=True)
    (folder / "marked.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = auto_map or {"AutoConfig": "marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedForCausalLM"}
    changes = {"model_type": "marked", "architectures": ["MarkedForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, commit, branch) -> the folder to fill: a cache as huggingface_hub lays it out, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def commit(name: str, commit: str, branch: str = "main") -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return snapshot

    return commit


@pytest.mark.parametrize("key", ["folder", "hub"])
def test_code_of_a_model_runs_only_where_the_recipe_says_so(tmp_path, hub, capsys, key):
    marker = tmp_path / "marker"
    folder = write_model(hub(f"stranger/{key}", COMMIT), marker)
    name = folder if key == "folder" else "stranger/hub"
    with pytest.raises(UserError, match=r"code that it needs, which is not run: .* model\.trust_remote_code=true"):
        load(name)
    assert not marker.exists() and "warning" not in capsys.readouterr().err
    policy = load(name, trust_remote_code=True, revision=None if key == "folder" else COMMIT)
    assert marker.exists() and type(policy.model.get_base_model()).__name__ == "MarkedForCausalLM"
    warning = capsys.readouterr().err
    assert f"Python code of {name} ({policy.origin}) runs on this machine with your rights" in warning


def test_code_that_is_not_needed_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    folder = write_model(tmp_path / "m", marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "marked.MarkedConfig"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_trusted_code_by_a_hub_name_needs_a_commit(tmp_path, hub, revision):
    marker = tmp_path / "marker"
    write_model(hub("stranger/moving", COMMIT), marker)
    if revision == COMMIT[:12]:
        hub("stranger/moving", COMMIT[:-1] + "0", revision)
        write_model(tmp_path / "hub" / "models--stranger--moving" / "snapshots" / (COMMIT[:-1] + "0"), marker)
    with pytest.raises(UserError, match=r"needs model\.revision as a commit hash: .* Today it is a1a1"):
        load("stranger/moving", trust_remote_code=True, revision=revision)
    assert not marker.exists()


def test_code_from_another_repository_is_refused(tmp_path, hub):
    marker = tmp_path / "marker"
    write_model(hub("evil/other", COMMIT), marker)
    elsewhere = {"AutoConfig": "evil/other--marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedForCausalLM"}
    write_model(tmp_path / "m", marker, elsewhere)
    with pytest.raises(UserError, match=r"takes its code from evil/other, which can change"):
        load(tmp_path / "m", trust_remote_code=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.clear() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_chat_template_reaches_no_python(tmp_path, template):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "m")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(UserError, match=r"chat template of .* cannot be applied \((SecurityError|OverflowError)"):
        load(folder)


def test_an_adapter_cannot_put_another_model_in_its_place(tmp_path, hub):
    shutil.copytree(TINY_MODEL, hub("someone/base", COMMIT), dirs_exist_ok=True)
    snapshot = shutil.copytree(TINY_MODEL, hub("someone/adapter", COMMIT), dirs_exist_ok=True)
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    with pytest.raises(UserError, match="someone/adapter is an adapter: give the model"):
        load("someone/adapter")


def test_a_hub_name_is_resolved_once_and_all_of_it_loaded_from_there(tmp_path, hub):
    shutil.copytree(TINY_MODEL, hub("someone/model", COMMIT), dirs_exist_ok=True)
    shutil.copytree(TINY_MODEL, later := hub("someone/model", LATER), dirs_exist_ok=True)
    tokenizer = json.loads((later / "tokenizer_config.json").read_text())
    (later / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": "later"}))
    assert load("someone/model").origin == f"commit {LATER}"
    pinned = load("someone/model", revision=COMMIT)
    assert pinned.origin == f"commit {COMMIT}" and pinned.tokenizer.chat_template != "later"
    assert pinned.model.get_base_model().config._commit_hash == COMMIT
    hub("someone/model", "c3" * 20)  # a commit of which nothing is here
    with pytest.raises(UserError, match="neither a folder here nor a model that the hub gives"):
        load("someone/model")


def test_a_folder_is_told_by_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(TINY_MODEL, folder)
    first = model_origin(ModelSettings(name=str(folder)))
    assert first.commit is None and first.digest == folder_digest(TINY_MODEL)
    monkeypatch.setattr("hapo_lite.model.origins.HASHED_WHOLE", 1 << 20)
    before = folder_digest(folder)
    (folder / "README.md").write_text("does not count")
    assert folder_digest(folder) == before
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_digest(folder) != before


# --------------------------------------------------------------------------------------------------- in a run's folder


@pytest.fixture
def hub_data(tmp_path, monkeypatch):
    """hub_data(commit, first): what datasets keeps of `someone/set` at a commit; problems count from `first`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ages = itertools.count(1)

    def prepare(commit: str, first: int) -> None:
        rows = {"problem": [f"{i}+1=?" for i in range(first, first + 30)], "answer": [str(i) for i in range(30)]}
        pq.write_table(pa.table(rows), tmp_path / "train.parquet")
        files = {"train": str(tmp_path / "train.parquet")}
        where = {"cache_dir": str(tmp_path / "datasets"), "repo_id": "someone/set", "dataset_name": "set"}
        builder = Parquet(**where, hash=commit, data_files=files)
        builder.download_and_prepare()
        # Given files by hand, datasets adds their hash to the folder's name.
        kept = tmp_path / "datasets" / "someone___set" / "default" / "0.0.0" / commit
        kept.parent.mkdir(parents=True, exist_ok=True)
        Path(builder.cache_dir).rename(kept)
        os.utime(kept, (age := 2e9 + next(ages), age))

    return prepare


def test_a_run_records_its_commits_and_goes_on_with_no_others(tmp_path, make_recipe, hub, hub_data):
    shutil.copytree(TINY_MODEL, hub("someone/model", COMMIT), dirs_exist_ok=True)
    hub_data(COMMIT, 1)
    settings = ["model.name=someone/model", "data.source=someone/set", "checkpoint.every=1", "data.system_prompt=null"]
    recipe = make_recipe(*settings, "training.iterations=1")
    origins = {"model": f"commit {COMMIT}", "data": f"commit {COMMIT}"}
    assert run.train(recipe)["origins"] == origins
    record = read_record(recipe.run_dir / "checkpoints" / "000001")
    assert record["origins"] == origins

    on = [*settings, "training.iterations=2"]
    shutil.copytree(TINY_MODEL, hub("someone/model", LATER), dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"base model is another .*now commit {LATER}\): set model\.revision={COMMIT}"):
        run.train(make_recipe(*on))
    on.append(f"model.revision={COMMIT}")
    hub_data(LATER, 1000)
    with pytest.raises(UserError, match=rf"training prompts are others than .*{LATER}\): set data\.revision={COMMIT}"):
        run.train(make_recipe(*on))
    with pytest.raises(UserError, match=rf"is here at commit {LATER} only, .* data\.revision={LATER}"):
        run.train(make_recipe(*on, f"data.revision={COMMIT}"))
    shutil.rmtree(tmp_path / "datasets")
    hub_data(COMMIT, 1)
    summary = run.train(make_recipe(*on, f"data.revision={COMMIT}"))
    assert summary["iterations"] == 2 and summary["origins"] == origins


def test_a_run_on_files_goes_on_with_no_others(tmp_path, make_recipe):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "m")
    data = jsonl(tmp_path, *[{"problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(20)])
    settings = [f"model.name={folder}", f"data.source={data}", "checkpoint.every=1"]
    origins = run.train(make_recipe(*settings, "training.iterations=1"))["origins"]
    assert origins["data"] == f"sha256 {hashlib.sha256(data.read_bytes()).hexdigest()}"
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(UserError, match=r"base model is another than .*: put the model back as it was to go on"):
        run.train(make_recipe(*settings, "training.iterations=2"))


def test_an_evaluation_of_a_model_that_has_moved_begins_anew(tmp_path, make_recipe, hub):
    shutil.copytree(TINY_MODEL, hub("someone/model", COMMIT), dirs_exist_ok=True)
    small = ["model.name=someone/model", "benchmark.limit=2", "benchmark.samples=1"]
    first = evaluate(make_recipe(*small))["tiny"]["files"]
    assert evaluate(make_recipe(*small))["tiny"]["files"] == first
    shutil.copytree(TINY_MODEL, hub("someone/model", LATER), dirs_exist_ok=True)
    assert evaluate(make_recipe(*small))["tiny"]["files"] != first
