"""Chat templates as models bring them: dated, without a system role, thinking, with a second BOS, none, broken."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import gradio as gr
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.evaluate.__main__ import main as evaluate
from hapo_lite.evaluate.suites import fit
from hapo_lite.export.merge import _load as load_unquantised
from hapo_lite.export.probes import gather_probes
from hapo_lite.export.source import open_source
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes
from hapo_lite.inspect.tabs.state import AppState
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.model.template import encode_open
from hapo_lite.recipe import ModelSettings, first_incompatible_setting, load_recipe
from hapo_lite.records import Completion, EncodedPrompt, Prompt, Sequences
from hapo_lite.runs.folder import RunFolder, with_date_of
from hapo_lite.train.prompts import first_prompt
from tests.commands import ENVIRONMENT, SMALL
from tests.conftest import ROOT, TINY
from tests.test_run import accelerate, train_here

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DATED = "{{ strftime_now('%d %b %Y') }} " + TURNS + OPEN
THINKS = "{% if enable_thinking is not defined or enable_thinking %}/think {% endif %}" + TURNS + OPEN
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
DROPS_SYSTEM = TURNS.replace("in messages", "in messages if m.role != 'system'") + OPEN
DATED_AND_THINKS = "{{ strftime_now('%d %b %Y') }} " + THINKS
FORGETS_THOUGHTS = TURNS.replace("m.content", "m.content.split('</think>')[-1]") + OPEN
CHAT = [{"role": "user", "content": "1+2=?"}]


def write_model(folder: Path, template: str | None, **config) -> str:
    """The folder of the bundled model with another chat template; None: with none. config: of its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TINY_MODEL, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    known = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    path.write_text(json.dumps(known | ({"chat_template": template} if template else {}) | config))
    return str(folder)


@pytest.fixture
def model(tmp_path):
    """model(template): the folder of `write_model`."""
    return partial(write_model, tmp_path / "model")


def loaded(name, **settings):
    return load_policy(ModelSettings(name=name, quantization="none", **settings), 0, "cpu")


def written(policy, chat=CHAT):
    return policy.tokenizer.decode(policy.encode(chat), skip_special_tokens=False)


def lines(policy, *messages):
    prompt = Prompt("p", messages, "3")
    return "\n".join(first_prompt([None, EncodedPrompt(0, prompt, tuple(policy.encode(prompt.chat())))], policy))


def test_a_dated_template_keeps_the_day_on_which_the_policy_was_loaded(model, monkeypatch):
    monkeypatch.setattr("hapo_lite.model.load.today", lambda: datetime.date(2020, 2, 29))
    policy = loaded(model(DATED))
    assert written(policy).startswith("29 Feb 2020")
    monkeypatch.setattr("hapo_lite.model.load.today", lambda: datetime.date(2020, 3, 1))
    assert written(policy).startswith("29 Feb 2020")  # over midnight
    assert written(loaded(model(DATED))).startswith("01 Mar 2020")
    assert written(loaded(model(DATED), chat_template_date="1999-12-31")).startswith("31 Dec 1999")


def test_a_run_with_a_dated_template_is_resumed_the_next_day(model, tmp_path, monkeypatch, capsys):
    name = f"model.name={model(DATED)}"
    monkeypatch.setattr("hapo_lite.model.load.today", lambda: datetime.date(2020, 2, 29))
    assert train_here(tmp_path, name, "training.iterations=2") == 0, capsys.readouterr().err
    assert "  | 29 Feb 2020 <|im_start|>user" in capsys.readouterr().out
    recipe = yaml.safe_load((tmp_path / "tiny_cpu" / "recipe.yaml").read_text())
    assert recipe["model"]["chat_template_date"] == "2020-02-29"
    monkeypatch.setattr("hapo_lite.model.load.today", lambda: datetime.date(2020, 3, 1))
    assert train_here(tmp_path, name, "training.iterations=3") == 0, capsys.readouterr().err
    assert "after iteration 2" in capsys.readouterr().out
    assert train_here(tmp_path, name, "training.iterations=4", "model.chat_template_date=2021-01-01") == 2
    assert "model.chat_template_date = 2020-02-29" in capsys.readouterr().err


@pytest.fixture(scope="module")
def thinking_run(tmp_path_factory):
    """The folder of a run on 29 Feb 2020, its first prompt as it was printed, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("thinking")
    overrides = [
        f"model.name={write_model(folder / 'model', DATED_AND_THINKS)}",
        "model.chat_template_options={enable_thinking: false}",
        'data.system_prompt="Add, then\\nmultiply. "',
        "training.iterations=1",
        "evaluation.prompts=0",
    ]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("hapo_lite.model.load.today", lambda: datetime.date(2020, 2, 29))
        assert train_here(folder, *overrides) == 0
    first = "\n".join(line[4:] for line in printed.getvalue().splitlines() if line.startswith("  | "))
    assert first.startswith("29 Feb 2020 <|im_start|>system\nAdd, then\nmultiply. <|im_end|>")
    return folder / "tiny_cpu", first, overrides


def problem_in(rendered: str) -> str:
    return rendered.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def test_the_inspector_renders_a_prompt_as_the_run_did(thinking_run):
    folder, first, _ = thinking_run
    app = AppState("", "", folder)
    with gr.Blocks():
        limits = LimitBoxes(app, "generate")
        boxes = ModelBoxes(app, "generate", limits)
    values = {box: box.value for box in boxes.inputs | limits.inputs}
    assert values[boxes.run] == "tiny_cpu"

    def rendered():
        settings = boxes.settings(values, problem_in(first), limits)
        return written(boxes.policy(values), [{"role": role, "content": text} for role, text in settings.messages])

    assert rendered().rstrip("\n") == first
    values[boxes.run] = ""
    assert "/think <|im_start|>system" in rendered() and "29 Feb 2020" not in rendered()


def test_an_export_asks_as_the_run_did(thinking_run):
    folder, first, _ = thinking_run
    source = open_source(folder, None)
    policy = load_unquantised(source, source.base, torch.device("cpu"), torch.float32, source.adapter)
    probes = gather_probes(source, policy, print)
    head = first.partition("<|im_start|>user")[0]
    asked = [policy.tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in probes.texts]
    asked += [policy.tokenizer.decode(ids, skip_special_tokens=False) for ids in probes.prompts]
    assert len(asked) > len(probes.texts) > 0 and all(text.startswith(head) for text in asked)


@pytest.mark.parametrize("as_trained", [True, False])
def test_an_evaluation_asks_as_the_run_did_or_says_that_it_does_not(thinking_run, monkeypatch, capsys, as_trained):
    folder, first, overrides = thinking_run
    asked = []

    def fitted(problems, policy, *rest):
        suite = fit(problems, policy, *rest)
        asked.append(policy.tokenizer.decode(suite.prompts[0].ids, skip_special_tokens=False))
        return suite

    monkeypatch.setattr("hapo_lite.evaluate.evaluation.fit", fitted)
    few = [
        "--suite",
        "tiny",
        "benchmark.limit=1",
        "benchmark.samples=1",
        "reward.workers=1",
        f"output_dir={folder.parent}",
    ]
    given = overrides if as_trained else [o for o in overrides if "options" not in o]
    assert run_command(evaluate, [str(TINY), *given, *few]) == 0
    head = first.partition("<|im_start|>")[0]
    assert asked[0].startswith(head if as_trained else head + "/think ")
    note = 'was trained with model.chat_template_options={"enable_thinking": false}'
    assert (note in capsys.readouterr().out) == (not as_trained)


CLOCKS_APART = """
import datetime, os, sys
from pathlib import Path

from hapo_lite.model import load
from hapo_lite.train import run
from hapo_lite.train.__main__ import command

rank, folder, day = int(os.environ["RANK"]), Path(sys.argv.pop(1)), datetime.date.fromisoformat(sys.argv.pop(1))
# Process 0 reads its clock before midnight, and process 1 after it.
load.today = lambda: day + datetime.timedelta(days=rank)
load_policy = run.load_policy

def load_and_write(*arguments, **options):
    policy = load_policy(*arguments, **options)
    ids = policy.encode([{"role": "user", "content": "1+2=?"}])
    (folder / f"{day}-{rank}").write_text(policy.tokenizer.decode(ids, skip_special_tokens=False))
    return policy

run.load_policy = load_and_write
sys.exit(command())
"""


@pytest.mark.slow
def test_processes_on_both_sides_of_midnight_ask_the_same(model, tmp_path):
    """The first process decides, and the run's folder keeps what it has decided for later days."""
    program = tmp_path / "clocks_apart.py"
    program.write_text(CLOCKS_APART)
    for day, iterations in (("2020-02-29", 1), ("2020-03-07", 2)):
        settings = [f"model.name={model(DATED)}", f"training.iterations={iterations}", "evaluation.prompts=0"]
        start = [*accelerate("ddp"), str(program), str(tmp_path), day]
        arguments = [str(TINY), f"output_dir={tmp_path}", *SMALL, *settings]
        done = subprocess.run(
            [*start, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "2 x cpu" in done.stdout
        both = [(tmp_path / f"{day}-{rank}").read_text() for rank in range(2)]
        assert both[0].startswith("29 Feb 2020 <|im_start|>user") and both[0] == both[1]
    assert "resuming" in done.stdout and "after iteration 1" in done.stdout
    recipe = yaml.safe_load((tmp_path / "tiny_cpu" / "recipe.yaml").read_text())
    assert recipe["model"]["chat_template_date"] == "2020-02-29"


def test_the_date_of_a_run_is_taken_from_its_folder(make_recipe):
    recipe = make_recipe()
    folder = RunFolder(recipe.run_dir)
    assert with_date_of(folder, recipe) is recipe
    recipe.run_dir.mkdir(parents=True)
    for text in ("[", "model: {chat_template_date: never}", "model: 3", recipe.to_yaml()):
        folder.recipe.write_text(text)
        assert with_date_of(folder, recipe) == recipe
    folder.recipe.write_text("model: {chat_template_date: '2020-02-29'}")
    assert with_date_of(folder, recipe).model.chat_template_date == datetime.date(2020, 2, 29)
    assert (
        with_date_of(folder, make_recipe("model.chat_template_date=1999-12-31")).model.chat_template_date.year == 1999
    )


def test_options_reach_the_template(model):
    assert written(loaded(model(THINKS))).startswith("/think")
    assert not written(loaded(model(THINKS), chat_template_options={"enable_thinking": False})).startswith("/think")


@pytest.mark.parametrize(
    ("template", "option", "message"),
    [
        (THINKS, "enable_thinkng", "is not read by the chat template of .*: check its spelling"),
        (THINKS, "add_generation_prompt", "is set by hapo_lite itself"),
        (None, "enable_thinking", "has no effect: .* has no chat template"),
    ],
)
def test_an_option_without_an_effect_is_refused(model, template, option, message):
    with pytest.raises(UserError, match=rf"model\.chat_template_options\.{option} {message}"):
        loaded(model(template), chat_template_options={option: False})


def test_an_option_that_is_added_or_taken_away_makes_another_run(make_recipe):
    plain, thinking = make_recipe(), make_recipe("model.chat_template_options.enable_thinking=false")
    for before, now in ((plain, thinking), (thinking, plain)):
        assert "chat_template_options.enable_thinking" in first_incompatible_setting(
            before.model_dump(mode="json"), now
        )
    assert first_incompatible_setting(thinking.model_dump(mode="json"), thinking) is None


def test_a_template_without_a_system_role_is_answered_with_the_setting(model):
    policy = loaded(model(NO_SYSTEM))
    policy.encode(CHAT)
    with pytest.raises(UserError, match=r"System role not supported.*set data\.system_prompt=null"):
        policy.encode([{"role": "system", "content": "Be brief."}, *CHAT])


def test_a_template_that_fails_for_another_reason_blames_no_system_message(model):
    with pytest.raises(UserError, match="cannot be applied") as error:
        loaded(model("{{ raise_exception('no') }}")).encode([{"role": "system", "content": "Be brief."}, *CHAT])
    assert "system_prompt" not in str(error.value)


def test_a_system_message_that_the_template_drops_is_noticed(model):
    messages = (("system", "Be brief."), ("user", "1+2=?"))
    assert "note: the chat template leaves the system message out" in lines(loaded(model(DROPS_SYSTEM)), *messages)
    assert "note" not in lines(loaded(model(TURNS + OPEN)), *messages)


def test_a_template_that_strips_thoughts_from_history_leaves_the_completion_whole(model):
    """What is trained on are the sampled ids; no completion goes through the template again."""
    policy = loaded(model(FORGETS_THOUGHTS))
    history = [*CHAT, {"role": "assistant", "content": "<think>1+2</think>3"}, {"role": "user", "content": "sure?"}]
    assert "<think>" not in written(policy, history)
    answer = policy.tokenizer.encode("<think>1+2</think>3", add_special_tokens=False)
    prompt = EncodedPrompt(0, Prompt("p", (("user", "1+2=?"),), "3"), tuple(policy.encode(CHAT)))
    zeros = torch.zeros(len(answer))
    batch = Sequences.of([Completion(prompt, 0, torch.tensor(answer), "", False, zeros, zeros, zeros, zeros)])
    assert batch.ids[0].tolist() == [*prompt.ids, *answer]


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}" + TURNS + OPEN, "{{ bos_token }}{{ bos_token }}" + TURNS + OPEN]
)
def test_the_token_that_begins_a_text_stands_once(model, template):
    policy = loaded(model(template, bos_token="<|endoftext|>", add_bos_token=True))
    ids, bos = policy.encode(CHAT), policy.tokenizer.bos_token_id
    assert ids[0] == bos and bos not in ids[1:]


def test_without_a_template_the_messages_stand_below_each_other(model):
    policy = loaded(model(None))
    assert written(policy, [{"role": "system", "content": "1+1=?"}, *CHAT]) == "1+1=?\n\n1+2=?\n\n"


def test_a_prompt_never_ends_in_a_token_that_the_tokenizer_appends():
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {eos}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", eos)],
    )
    assert tokenizer.encode("1+2")[-1] == tokenizer.eos_token_id
    ids = encode_open(tokenizer, "1+2")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>1+2"


def test_rewards_read_every_special_token_but_stop_and_padding(model):
    policy = loaded(model(TURNS + OPEN))
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = policy.tokenizer.encode("<think>2+2</think>4", add_special_tokens=False)
    assert policy.decode([*ids, policy.stop_ids[0], policy.tokenizer.pad_token_id]) == "<think>2+2</think>4"


def test_the_first_prompt_is_shown_with_its_special_tokens_and_no_control_characters(model):
    policy = loaded(model(TURNS + OPEN))
    assert lines(policy, ("user", "1+2=?")).splitlines()[1:] == [
        "  | <|im_start|>user",
        "  | 1+2=?<|im_end|>",
        "  | <|im_start|>assistant",
    ]
    hidden = lines(policy, ("user", "1\x1b[2J2"))
    assert "\x1b" not in hidden
    assert len(lines(policy, ("user", "1+" * 5000))) < 2500


def test_the_shipped_recipe_of_a_thinking_model_does_without_thoughts():
    assert load_recipe(ROOT / "recipes" / "qwen3_8b_24gb.yaml").model.chat_template_options == {
        "enable_thinking": False
    }


def test_an_open_thought_belongs_to_the_prompt(model):
    policy = loaded(model(TURNS + OPEN.replace("assistant\n", "assistant\n<think>\n")))
    assert written(policy).endswith("assistant\n<think>\n")
    assert policy.decode(policy.tokenizer.encode("2+2</think>4")) == "2+2</think>4"


@pytest.mark.parametrize(
    ("begins", "opening"), [("", ""), ("<think>\\n", "<think>"), ("<think>\\n\\n</think>\\n\\n", "")]
)
def test_a_thought_that_the_template_opens_is_known(model, begins, opening):
    template = TURNS + OPEN.replace("assistant\n", f"assistant\n{begins}".encode().decode("unicode_escape"))
    assert loaded(model(template)).opening == opening
