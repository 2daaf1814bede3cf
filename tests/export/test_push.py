"""Uploading an export: private unless told, listed in a dry run without a network, and never with a token in a file."""

from __future__ import annotations

import base64
import json
import socket

import huggingface_hub
import pytest

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from tests.export.command import WEIGHTS, complaint
from tests.export.hub import Hub

SECRET = "hf_" + "a1B2" * 8


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.fixture
def hub(no_token, monkeypatch):
    """hub(private) -> a hub that the library asks, with a token to ask it."""
    with Hub() as made:
        monkeypatch.setenv("HF_TOKEN", SECRET)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield made


def push(run, *more) -> list[str]:
    return [str(run), "--to", "adapter", "--push", "me/mine", *more]


def test_a_dry_run_lists_what_it_would_upload_and_asks_nobody(run, capsys, no_token, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert run_command(command.main, push(run, "--dry-run")) == 0
    out = capsys.readouterr().out
    folder = run / "export" / "adapter"
    files = sorted(folder.iterdir())
    size = sum(path.stat().st_size for path in files) / 1e6
    assert "dry run, nothing is uploaded: repository me/mine, private: you and those you invite see it" in out
    assert f"{len(files)} files, {size:.2f} MB" in out
    for path in files:
        assert f"{path.stat().st_size:>14,}  {path.name}\n" in out
    card = (folder / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card and '"."' not in card
    assert run_command(command.main, push(run, "--dry-run", "--public")) == 0
    assert "repository me/mine, public: everybody sees it" in capsys.readouterr().out


@pytest.mark.parametrize("public", [False, True])
def test_every_file_is_uploaded_to_a_repository_that_is_private_unless_told(run, capsys, hub, public):
    assert run_command(command.main, push(run, *(["--public"] if public else []))) == 0
    assert hub.private is not public
    folder = run / "export" / "adapter"
    files = {path.name: path for path in folder.iterdir()}
    sent = hub.committed()
    assert sent.keys() == files.keys() and WEIGHTS in sent
    assert all(base64.b64decode(sent[name]) == path.read_bytes() for name, path in files.items())
    assert {token for _, _, _, token in hub.asked} == {f"Bearer {SECRET}"}
    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert SECRET not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("private", "more", "sentence"), [(False, [], "is public already"), (True, ["--public"], "is private")]
)
def test_nothing_is_uploaded_to_a_repository_of_the_other_kind(run, capsys, hub, private, more, sentence):
    hub.private = private
    assert sentence in complaint(capsys, *push(run, *more))
    assert not [path for _, path, _, _ in hub.asked if "/commit/" in path]


def test_what_cannot_be_uploaded_is_told_before_anything_is_written(run, capsys, no_token):
    assert "--push needs a token of the hub that may write: run hf auth login" in complaint(capsys, *push(run))
    for name, words in (("mine", "names no owner: give OWNER/mine"), ("me/a b", "is no name on the hub")):
        assert words in complaint(capsys, run, "--to", "adapter", "--push", name, "--dry-run")
    assert "give --push OWNER/NAME with them" in complaint(capsys, run, "--to", "adapter", "--dry-run")
    assert not (run / "export").exists()


def test_a_hub_that_is_not_there_is_one_sentence_and_the_export_stays(run, capsys, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    line = complaint(capsys, *push(run))
    assert "is exported, and could not be uploaded to me/mine (" in line and "check the network" in line
    assert (run / "export" / "adapter" / WEIGHTS).is_file()


@pytest.mark.parametrize("secret", [SECRET, "https://me:pass@example.org/data"])
def test_a_token_in_a_file_is_not_uploaded(run, capsys, hub, secret):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"note": secret}))
    line = complaint(capsys, *push(run))
    assert "adapter_config.json holds what looks like a token or a password" in line and secret not in line
    assert not hub.asked
