"""The inspector's server: what it gives out and to whom, asked without a browser."""

from __future__ import annotations

import random
import re
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from benchmarks import inspector_load
from hapo_lite.errors import UserError
from hapo_lite.inspect.generate import ModelShelf
from tests.conftest import ROOT


def test_many_who_ask_at_once_get_their_own_answers(address):
    """By the server's own interface; benchmarks/inspector_load.py asks more of them and looks at what grows."""
    draw, shelf = random.Random(0), ModelShelf()
    questions = [inspector_load.Question.drawn(draw) for _ in range(8)]
    expected = [question.answered_here(shelf) for question in questions]
    assert len(set(expected)) == len(expected)
    clients = [Client(address, verbose=False) for _ in range(4)]
    assert inspector_load.ask_at_once(clients, questions, expected) == 0


def test_the_server_gives_out_no_other_files(address, root):
    # Imported late: it imports gradio, which reads what app.serve puts into the environment.
    from hapo_lite.inspect.tabs.page import PLOTLY_JS

    ask = build_opener(ProxyHandler({})).open
    assert ask(f"{address}gradio_api/file={PLOTLY_JS}").status == 200
    files = [root / "plain" / "metrics.jsonl", root.parent / "secret" / "traces" / "000000.jsonl", ROOT / "app.py"]
    paths = [f"gradio_api/file={file}" for file in ("/etc/hostname", "//etc/hostname", "app.py", *files)]
    paths += [f"gradio_api/file={PLOTLY_JS.parent}/{up}/__init__.py" for up in ("..", "%2e%2e", "..%2f..")]
    paths += ["static/..%2f..%2f..%2fetc%2fhostname", "file=/etc/hostname", f"gradio_api/proxy={address}config"]
    for path in paths:
        with pytest.raises(HTTPError) as refused:
            ask(f"{address}{path}")
        assert refused.value.code in (400, 403, 404), path


def test_asked_directly_the_server_opens_no_other_runs(address, root):
    client = Client(address, verbose=False)
    for api in ("/open", "/refresh", "/_fill"):
        for name in ("../secret", "plain/../../secret", str(root.parent / "secret"), "/etc", ["x"]):
            with pytest.raises(AppError, match="not in the list of choices"):
                client.predict(name, api_name=api)
    # A link in the folder of runs is in the list; where it leads is not opened.
    shown = str(client.predict("linked", api_name="/open"))
    assert "leads out of" in shown and "secret" not in shown.replace(str(root / "linked"), "")
    with pytest.raises(AppError, match="leads out of"):
        client.predict("linked", api_name="/_fill")


def test_a_run_that_is_none_is_named(serve, tmp_path):
    with pytest.raises(UserError, match="is no run"):
        serve("--run", str(tmp_path / "nothing"))


def test_on_colab_no_tunnel_to_the_outside_is_opened(serve, monkeypatch):
    asked = []
    monkeypatch.setattr("gradio.utils.colab_check", lambda: True)
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **options: asked.append(options))
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+/", serve())
    assert not asked
