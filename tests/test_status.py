"""status.json: one run to a folder, no lock left over, and a record of what it was doing when it died."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hapo_lite.errors import UserError
from hapo_lite.runs.status import Status, read_status
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from hapo_lite.status import Status
with Status(Path(sys.argv[1])) as status:
    status.doing.iteration = 7
    status.enter("rollout")
    status.enter("update")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path):
    path = tmp_path / "status.json"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*, in iteration 7: .*name="):
            Status(path).claim()
    finally:
        holder.kill()
        holder.communicate()
    doing = read_status(path)
    assert (doing.process, doing.iteration, doing.stage) == (holder.pid, 7, "update")
    assert doing.entered == {"starting": 1, "rollout": 1, "update": 1}
    with Status(path) as status:
        status.claim()
        assert read_status(path).stage == "starting"
    assert read_status(path).stage == "finished"


def test_the_folder_is_free_again_after_the_context_in_the_same_process(tmp_path):
    path = tmp_path / "status.json"
    with Status(path), pytest.raises(UserError, match="in use"):
        Status(path).claim()
    with pytest.raises(KeyError), Status(path):
        raise KeyError
    assert read_status(path).stage == "stopped"
    with Status(path):
        pass
