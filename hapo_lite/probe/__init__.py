"""`python -m hapo_lite.probe` measures how often each prompt is solved. In Python: `hapo_lite.probe(recipe)`."""

from hapo_lite.train import make_callable

make_callable(__name__, "hapo_lite.probe.probing")
