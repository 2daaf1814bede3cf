"""`python -m hapo_lite.sft`: a supervised warm start on worked solutions. In Python: `hapo_lite.sft(recipe)`."""

from hapo_lite.train import make_callable

make_callable(__name__, "hapo_lite.sft.run")
