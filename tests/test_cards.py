"""What a card would do, shown without one: faults that docs/gpu.md lists, each by its mechanism.

Those of the loss scaler are in test_numbers.py, of memory that runs out in test_shortage.py, of Triton in
test_head_triton.py, of Unsloth in test_unsloth_engine.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import bitsandbytes
import peft.import_utils
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from packaging.requirements import Requirement
from torch.nn import functional
from transformers import AttentionInterface, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hapo_lite.cli import ALLOCATOR_SETTINGS
from hapo_lite.errors import UserError
from hapo_lite.model import load
from hapo_lite.model.attention import attend_with_repeated_keys
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from hapo_lite.train.accelerator import unseen_gpu
from hapo_lite.train.memory.predict import Predictor
from tests.conftest import ROOT, TINY


@pytest.fixture
def pages(monkeypatch):
    """bitsandbytes' pages on a CPU: buffers with its mark. Prefetching any other memory ends the process, as there."""
    made: dict[int, torch.Tensor] = {}

    def page(optimizer, parameter, dtype=torch.float32):
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        buffer.page_deviceid = 0
        made[buffer.data_ptr()] = buffer
        return buffer

    def prefetch(tensor, to_cpu=False):
        if tensor.data_ptr() not in made:
            sys.exit(1)

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", page)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", prefetch)
    return made


def test_a_run_with_paged_states_goes_on_from_its_checkpoint(pages, make_recipe, make_loop, tmp_path):
    recipe = make_recipe("training.optimizer=paged_adamw_8bit")
    before, after = make_loop(recipe), make_loop(recipe)
    state, _, _ = before.step(TrainState())
    path = save_checkpoint(tmp_path, before.parts, state, recipe)
    saved = torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"][0]
    assert saved["__bnb_optimizer_quant_state__"]["state1"].is_paged  # the mark is in the file
    assert load_checkpoint(Checkpoint.read(path), after.parts) == state
    for ours, theirs in zip(after.learner.parameters, before.learner.parameters, strict=True):
        for name in ("state1", "state2"):
            page = after.learner.optimizer.state[ours][name]
            assert page.data_ptr() in pages and page.is_paged
            assert torch.equal(page, before.learner.optimizer.state[theirs][name])
    # The completions need not be those of one run: what counts is that the step is taken.
    assert after.step(state)[1]["update/skipped"] == 0


def test_torch_is_new_enough_for_the_heads_products():
    """mm(out_dtype=) with 16-bit factors came with torch 2.8, addmm(out_dtype=) with 2.10, and a CPU has neither."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [wanted] = [r for r in map(Requirement, project["dependencies"]) if r.name == "torch"]
    assert "2.10.0" in wanted.specifier and "2.9.1" not in wanted.specifier


@pytest.fixture
def old_torchao(monkeypatch):
    """torchao 0.10 beside peft, as on Colab. Only its version is there, which is all that peft asks for."""
    find_spec, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "torchao" or find_spec(name, *a))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.0" if name == "torchao" else version(name))
    peft.import_utils.is_torchao_available.cache_clear()
    yield
    monkeypatch.undo()
    peft.import_utils.is_torchao_available.cache_clear()


def test_a_torchao_too_old_for_peft_is_a_sentence(old_torchao):
    settings = load_recipe(TINY, ["model.quantization=none"]).model
    named = r"incompatible version of torchao.* 0\.10\.0.*: upgrade that package or uninstall it"
    with pytest.raises(UserError, match=named):
        load_policy(settings, 0, "cpu")
    with pytest.raises(UserError, match=named):
        Predictor(load_recipe(TINY, ["model.quantization=none"]), "cpu")


def test_a_torchao_too_old_does_not_disturb_a_base_in_4_bits(old_torchao):
    load_policy(load_recipe(TINY).model, 0, "cpu")


def test_on_native_windows_the_package_says_where_it_runs():
    program = "import sys; sys.platform = 'win32'; import hapo_lite"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "ImportError: hapo_lite runs on Linux and macOS; on Windows it runs in WSL" in (
        done.stderr
    )


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert unseen_gpu() is None
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, sees no GPU, so the CPU computes" in unseen_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unseen_gpu() is None


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}])
def test_a_command_sets_the_allocator_before_torch_is_loaded(own):
    program = """
import os, sys
from hapo_lite.cli import run_command

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print({k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")})

sys.meta_path.insert(0, Watch())
run_command(lambda argv: __import__("torch"))
"""
    clean = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_SETTINGS}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=clean | own)
    expected = own or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert set(done.stdout.splitlines()) == {str(expected)}, done.stderr


def test_colab_keeps_its_torch_and_loses_its_torchao():
    notebook = json.loads((ROOT / "notebooks" / "colab_qwen1_5b.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if "install" in c["metadata"].get("tags", ())]
    install = "".join("".join(cell["source"]) for cell in cells)
    assert "requirements.txt" not in install and "pip install -q -e ." in install  # ranges, which its torch satisfies
    assert "uninstall -q -y torchao" in install


@pytest.mark.parametrize("setting", ["fp16", "auto"])
def test_eager_attention_in_fp16_is_refused(setting, monkeypatch):
    monkeypatch.setattr(load, "resolve_dtype", lambda name, device: torch.float16)
    settings = load_recipe(TINY, ["model.attention=eager", f"model.dtype={setting}"]).model
    with pytest.raises(UserError, match=r"model\.attention = eager overflows in fp16.*use model\.attention=sdpa"):
        load_policy(settings, 0, "cpu")


def test_repeated_keys_are_grouped_ones_for_a_kernel_that_knows_no_groups(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    states = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    asked, kernel = [], functional.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        asked.append((key.shape[1], options.get("enable_gqa", False), options["is_causal"]))
        return kernel(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    results = []
    for attend in (sdpa_attention_forward, attend_with_repeated_keys):
        out, _ = attend(module, *states, None, scaling=0.3)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), states)])
    assert asked == [(2, True, True), (6, False, True)]
    for grouped, repeated in zip(*results, strict=True):
        torch.testing.assert_close(repeated, grouped)


@pytest.mark.parametrize(("capability", "registered"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_a_card_below_sm80_gets_repeated_keys(capability, registered, monkeypatch):
    made = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(AttentionInterface, "register", lambda name, function: made.update({name: function}))
    monkeypatch.setattr(load, "model_origin", lambda settings: 1 / 0)  # the model itself would need the card
    with pytest.raises(ZeroDivisionError):
        load_policy(load_recipe(TINY).model, 0, "cuda")
    assert made == ({"sdpa": attend_with_repeated_keys} if registered else {})


def test_memory_is_predicted_with_repeated_keys_for_an_older_card(tmp_path, monkeypatch):
    """Without scores: at 1,536 tokens they would be most of the update."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 384, "vocab_size": 512}
    Qwen2Config(**heads, intermediate_size=512, num_hidden_layers=2).save_pretrained(tmp_path)
    overrides = [f"model.name={tmp_path}", "data.max_prompt_tokens=512", "rollout.max_new_tokens=1024"]
    overrides += ["training.micro_batch_tokens=6144", "model.gradient_checkpointing=true"]
    update = {}
    for dtype, attention in (("bf16", "sdpa"), ("fp16", "sdpa"), ("fp16", "eager")):
        recipe = load_recipe(TINY, [*overrides, f"model.dtype={dtype}", f"model.attention={attention}"])
        update[dtype, attention] = Predictor(recipe, "cuda").stages()[2].total
    tokens, width = 4 * 1536, 384
    more = update["fp16", "sdpa"] - update["bf16", "sdpa"]
    assert 2 * 2 * tokens * (width - 64) <= more <= 8 * 2 * tokens * width  # keys and values, and their gradients
    scores = 4 * 12 * 1536 * 1536 * 4
    assert update["fp16", "eager"] - update["fp16", "sdpa"] > scores
