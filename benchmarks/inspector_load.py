"""Does the inspector keep its visitors apart, and does anything in it grow? Several clients generate at once.

    python benchmarks/inspector_load.py [--generations 200] [--clients 8]

The page runs in a process of its own with the bundled model. Each client has its own session, problems, seeds and
lengths, and downloads the table of every generation. The table must be, to the last digit, that of what `generate`
writes for the question in this process. Memory, handles and threads are read from outside, after each quarter.
"""

from __future__ import annotations

import argparse
import math
import random
import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from gradio_client import Client

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import quiet_libraries  # noqa: E402
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate  # noqa: E402
from hapo_lite.inspect.tokens import csv_text, token_table  # noqa: E402

LENGTHS = (1, 32)
STARTING_S = 120.0


@dataclass(frozen=True)
class Question:
    """A request for one generation."""

    problem: str
    tokens: int
    seed: int

    @classmethod
    def drawn(cls, draw: random.Random) -> Question:
        a, b, c = (draw.randint(1, 99) for _ in range(3))
        return cls(f"{a}+{b}*{c}=?", draw.randint(*LENGTHS), draw.randrange(1000))

    def asked_of(self, client: Client) -> str:
        """The CSV that the page gives for this question."""
        client.predict(api_name="/arm")
        client.predict(param_1=self.problem, param_2=self.tokens, param_3=self.seed, api_name="/stream")
        file = client.predict(api_name="/write_csv")["value"]  # an update of the hidden file
        return Path(file).read_text("utf-8")

    def answered_here(self, shelf: ModelShelf) -> str:
        """The CSV that belongs to this question, generated in this process."""
        settings = GenerationSettings(self.problem, max_new_tokens=self.tokens, seed=self.seed)
        policy = shelf.get("tiny")
        [last] = deque(generate(policy, settings), maxlen=1)
        return csv_text(token_table(last.trace, settings.method, settings.temperature, policy.tokenizer))


def ask_at_once(clients: list[Client], questions: list[Question], expected: list[str]) -> int:
    """Have all clients ask their share of the questions at once, and return the number of wrong answers."""

    def work(place: int) -> int:
        own = range(place, len(questions), len(clients))
        return sum(questions[i].asked_of(clients[place]) != expected[i] for i in own)

    with ThreadPoolExecutor(len(clients)) as pool:
        return sum(pool.map(work, range(len(clients))))


def start() -> tuple[psutil.Popen, str]:
    """Start the inspector: (its process, its address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = psutil.Popen([sys.executable, str(ROOT / "app.py"), "--port", str(port)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}/"
        time.sleep(0.2)
    sys.exit("the inspector did not start")


def look(server: psutil.Process, asked: int, seconds: float) -> str:
    """A row of the table. asked: the generations so far."""
    memory = server.memory_info().rss / 2**20
    return f"{asked:>6}{seconds:>9.1f}{memory:>11.1f}{server.num_fds():>9}{server.num_threads():>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    quiet_libraries()
    draw = random.Random(0)
    shelf = ModelShelf()
    questions = [Question.drawn(draw) for _ in range(arguments.generations)]
    expected = [question.answered_here(shelf) for question in questions]
    server, address = start()
    try:
        clients = [Client(address, verbose=False) for _ in range(arguments.clients)]
        quarter = math.ceil(arguments.generations / 4)
        wrong = 0
        begun = time.monotonic()
        print(f"{'asked':>6}{'seconds':>9}{'RSS, MiB':>11}{'handles':>9}{'threads':>9}")
        for first in range(0, arguments.generations, quarter):
            part = slice(first, first + quarter)
            wrong += ask_at_once(clients, questions[part], expected[part])
            asked = min(first + quarter, arguments.generations)
            print(look(server, asked, time.monotonic() - begun), flush=True)
        print(f"{arguments.generations} generations, {arguments.clients} clients at once: {wrong} not their own")
    finally:
        server.terminate()
        server.wait()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
