"""Families of models, each as a small random one that goes through the commands (benchmarks/architectures)."""

from __future__ import annotations

import contextlib
import io
import re
import traceback
from types import SimpleNamespace

import pytest
import torch

from benchmarks.architectures.small import families, save_small_model
from benchmarks.architectures.trial import CLOSE, Done, Report, Step, Trial
from hapo_lite.errors import UserError
from hapo_lite.model.decoder import cache_name
from hapo_lite.model.experts import notes_on_packing
from hapo_lite.model.load import load_policy
from hapo_lite.model.refusals import own_errors
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.recipe import ModelSettings
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.rollout.canary import few_prompts
from hapo_lite.rollout.decoding import bucket
from hapo_lite.train.memory.predict import Predictor
from hapo_lite.train.memory.room import unpacks
from tests.commands import own_precision

# What transformers and peft say of a family is not under test.
pytestmark = pytest.mark.filterwarnings("ignore")

EAGER = ["model.attention=eager"]
TRAINS = {
    "llama": ([], "fixed"),
    "qwen3": ([], "fixed"),
    "gemma2": ([], "fixed"),  # windows, and a cap on its logits
    "mixtral": ([], "fixed"),  # experts
    "gpt2": ([], "fixed"),  # Conv1D, learned positions
    "gpt_neox": ([], "fixed"),  # attention and MLP side by side
    "opt": ([], "fixed"),
    "deepseek_v3": ([], "growing"),  # keys and values of different widths
    "gpt_oss": (EAGER, "growing"),  # sinks
    "mamba2": (EAGER, "growing"),  # no attention, and a cache of another name
    "falcon_h1": ([], "growing"),  # attention and a state space in one layer
    "modernbert-decoder": ([], "fixed"),  # its head reads something else than the decoder's output
}
"""By family: the settings that its refusals ask for, and its cache."""
REFUSED = {
    "bert": r"is not causal: what it computes for a token depends on the tokens after it.*choose a model that cont",
    "bart": r"cannot be trained: token by token, with a cache and beside a padded prompt, it computes other log-prob",
    "rwkv": r"cannot be sampled: RwkvForCausalLM keeps what it has read in no cache of transformers' kind",
    "xmod": r"its own code fails when it runs \(modeling_xmod\.py:\d+: ValueError: Input language unknown",
}
"""By family: the sentence of `train`."""


def here(step: Step) -> Done:
    """A step in this process."""
    out = io.StringIO()
    with own_precision(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = step()
        except Exception:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue())


def tried(family, tmp_path) -> Report:
    save_small_model(family, tmp_path / "model")
    return Trial(tmp_path, here).run(Report(family, ""))


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINS)
def test_a_family_trains_and_its_sampler_computes_what_its_trainer_computes(family, tmp_path):
    report = tried(family, tmp_path)
    settings, cache = TRAINS[family]
    # OPT's code asks for the values of a mask, which a prediction has not.
    preflight = "refused" if family == "opt" else "ran"
    wanted = {"train": "ran", "preflight": preflight, "evaluate": "ran", "export": "ran"}
    assert report.results == wanted, report.sentences
    assert (report.settings, report.facts["cache"]) == (settings, cache)
    assert report.trains and 0 < report.facts["gap"] <= CLOSE
    assert report.facts["packed"] and not report.facts["unmoved"]


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_train_is_refused_with_its_reason(family, tmp_path):
    report = tried(family, tmp_path)
    assert report.results["train"] == "refused" and "traceback" not in report.results.values()
    assert re.search(REFUSED[family], report.sentences["train"])


def test_every_family_of_transformers_is_known():
    assert len(families()) >= 55 and {*TRAINS, *REFUSED} <= set(families())


def loaded(family, tmp_path, **settings):
    save_small_model(family, tmp_path)
    return load_policy(ModelSettings(name=str(tmp_path), quantization="none", **settings), 0, "cpu")


def test_a_model_that_looks_ahead_is_refused_as_it_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"is not causal.*with model\.attention=eager some models are causal"):
        loaded("bert", tmp_path)


def test_fused_attention_that_a_family_has_not_is_answered_with_the_one_it_has(tmp_path):
    with pytest.raises(UserError, match=r"model\.attention = sdpa is not there for .*: set model\.attention=eager$"):
        loaded("bloom", tmp_path)
    assert loaded("bloom", tmp_path, attention="eager").base.config.model_type == "bloom"


def test_logits_that_are_changed_in_an_unknown_way_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hapo_lite.model.policy.MULTIPLIES_BY_LOGITS_SCALING", ())
    with pytest.raises(UserError, match="changes its logits after the head in a way that hapo_lite does not know"):
        loaded("hyperclovax", tmp_path)


@pytest.mark.parametrize(("family", "whole"), [("llama", False), ("modernbert-decoder", True), ("inkling_text", True)])
def test_what_the_head_reads_is_found_out(family, whole, tmp_path):
    """The sampler's head is the model's own, and its logits are those of `token_logprobs` on the trainer's states."""
    policy = loaded(family, tmp_path)
    assert policy.whole is whole
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        logits = policy.model.eval()(input_ids=ids).logits[0, :-1]
        states = policy.hidden_states(ids)[0, :-1]
    logp, _ = policy.token_logprobs(states, ids[0, 1:], 1.0)
    wanted = torch.log_softmax(logits.float(), -1).gather(1, ids[0, 1:, None]).squeeze(1)
    assert torch.allclose(logp, wanted, atol=1e-5) and wanted.std() > 0.1


def test_a_4_bit_base_without_a_packed_layer_is_said_to_be_one(tmp_path):
    for family, notes in {"falcon": 1, "llama": 0}.items():
        save_small_model(family, tmp_path / family)
        policy = load_policy(ModelSettings(name=str(tmp_path / family)), 0, "cpu")
        assert len(notes_on_packing(policy)) == notes
    assert notes_on_packing(loaded("gpt2", tmp_path / "full")) == []


def test_routers_and_what_kernels_read_have_no_adapter(tmp_path):
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in loaded("llama4_text", tmp_path / "a").trainable()}
    assert "router" not in adapted and {"q_proj", "up_proj"} <= adapted
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in loaded("falcon_h1", tmp_path / "b").trainable()}
    assert "out_proj" not in adapted and {"in_proj", "q_proj"} <= adapted


def test_a_cache_has_the_name_that_the_model_knows(tmp_path):
    policy = loaded("mamba2", tmp_path, attention="eager")
    assert cache_name(policy.model) == cache_name(policy.base) == "cache_params"


def test_a_base_whose_memory_cannot_be_predicted_stays_packed_on_a_gpu(tmp_path, make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    unpacked = {}
    for family in ("llama", "biogpt"):
        save_small_model(family, tmp_path / family)
        recipe = make_recipe(f"model.name={tmp_path / family}", "model.dtype=bf16", "rollout.unpacked_base=auto")
        unpacked[family] = unpacks(recipe, torch.device("cuda"))
    assert unpacked == {"llama": Unpacking.DECIDED, "biogpt": Unpacking.NEVER}
    with pytest.raises(UserError, match=r"the memory of model\.name = \S*biogpt cannot be predicted.*start the run"):
        Predictor(recipe, "cpu").stages()


def test_a_base_that_brings_its_own_code_stays_packed_on_a_gpu(tmp_path, make_recipe, monkeypatch):
    """The prediction never runs such code, and neither this nor a wrong name is an error before the model is loaded."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    for name in ("own", "not_there"):
        recipe = make_recipe(f"model.name={tmp_path / name}", "model.trust_remote_code=true")
        assert unpacks(recipe, torch.device("cuda")) is Unpacking.NEVER


@pytest.mark.slow
def test_a_loop_over_tokens_is_not_predicted(tmp_path, make_recipe, monkeypatch):
    """Its operators grow with the tokens, so that a prediction would take hours."""
    save_small_model("mamba", tmp_path / "m")
    overrides = [
        f"model.name={tmp_path / 'm'}",
        "model.attention=eager",
        "rollout.max_new_tokens=8",
        "training.micro_batch_tokens=64",
    ]
    with pytest.raises(UserError, match=r"multiplies by packed weights itself, so set model\.quantization=none$"):
        Predictor(make_recipe(*overrides), "cpu").stages()
    overrides.append("model.quantization=none")
    monkeypatch.setattr("hapo_lite.train.memory.live.MOST_OPERATORS", 8_000)
    Predictor(make_recipe(*overrides, "data.max_prompt_tokens=8"), "cpu").stages()
    words = r"cannot be predicted.*\(modeling_mamba\.py:\d+: TooManyOperators: more than 8,000"
    with pytest.raises(UserError, match=words):
        Predictor(make_recipe(*overrides, "data.max_prompt_tokens=400"), "cpu").stages()


def in_transformers(error):
    """A function that raises `error` on a line of transformers' code."""
    places = {"error": error}
    exec(compile("def fails(*_, **__):\n    raise error", "/site-packages/transformers/models/one.py", "exec"), places)
    return places["fails"]


def test_an_error_of_our_own_stays_one(tmp_path, monkeypatch):
    policy = loaded("llama", tmp_path)
    decoder, ids = policy.base.get_decoder(), torch.zeros(1, 1, dtype=torch.long)
    words = r"fails when it runs \(modeling_llama\.py:\d+: ValueError: You must specify"
    with pytest.raises(UserError, match=words), own_errors("mine", packed=False):
        decoder(use_cache=False)
    # An error of the card, which is raised wherever the model's code waits for it.
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    failures = [broken, RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), RuntimeError("CUDA error: unspecified launch")]
    raising = policy.base.get_input_embeddings()
    for failure in failures:
        with monkeypatch.context() as patched, pytest.raises(type(failure), match=str(failure)):
            patched.setattr(raising, "forward", in_transformers(failure))
            with own_errors("mine", packed=False):
                decoder(input_ids=ids)
    unsupported = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"no code for this card \(\w+\.py:\d+: CUDA"):
        patched.setattr(raising, "forward", in_transformers(unsupported))
        with own_errors("mine", packed=False):
            decoder(input_ids=ids)
    # An error in this package's code that the model's code calls.
    policy.base.get_input_embeddings().register_forward_hook(lambda *_: bucket("many"))
    with pytest.raises(AttributeError), own_errors("mine", packed=False):
        decoder(input_ids=ids)


def test_the_check_pads_a_prompt_and_reads_one_twice():
    def prompts(*lengths):
        return [EncodedPrompt(i, Prompt(str(i), (), ""), (5,) * n) for i, n in enumerate(lengths)]

    def chosen(*lengths):
        return [len(prompt.ids) for prompt in few_prompts(prompts(*lengths))]

    assert chosen(3, 3, 3, 3, 7, 9) == [3, 3, 7]
    assert chosen(3, 4, 4, 4, 7) == [3, 4, 4]
    assert chosen(3, 3, 3, 3) == [3, 3, 3]
    assert chosen(3) == [3] and chosen() == []
