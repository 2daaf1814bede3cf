"""Nothing of a generation stays: neither a component of the page, nor a part of the model's writing."""

from __future__ import annotations

import gc
from collections import Counter

from gradio_client import Client

from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate


def alive() -> Counter[str]:
    """Objects of gradio's components and of this package, by type."""
    gc.collect()
    found = (type(thing) for thing in gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__name__}" for kind in found if _counts(kind))


def _counts(kind: type) -> bool:
    return str(kind.__module__).startswith(("gradio.components", "gradio.layouts", "hapo_lite"))


def test_a_session_keeps_no_components_of_its_generations(address):
    client = Client(address, verbose=False)

    def generated(count: int) -> None:
        for seed in range(count):
            client.predict(api_name="/arm")
            client.predict(param_1="9*7+4=?", param_2=8, param_3=seed, api_name="/stream")
            client.predict(api_name="/write_csv")

    generated(2)
    before = alive()
    generated(4)
    grown = {name: count for name, count in (alive() - before).items() if not name.endswith(("Piece", "Snapshot"))}
    assert grown == {}


def test_the_writing_of_a_completion_leaves_nothing():
    policy = ModelShelf().get("tiny")

    def written(seed: int) -> None:
        for _ in generate(policy, GenerationSettings("9*7+4=?", max_new_tokens=8, seed=seed)):
            pass

    written(0)
    before = alive()
    for seed in range(3):
        written(seed)
    assert alive() - before == Counter()
