"""`python -m hapo_lite.evaluate` compares a base and its adapter on suites. In Python: `hapo_lite.evaluate(recipe)`."""

from hapo_lite.train import make_callable

make_callable(__name__, "hapo_lite.evaluate.evaluation")
