"""The plug-in's logits processor, in a vLLM on a CPU whose weights verl can replace.

vLLM's CPU build packs the weights for oneDNN once they are loaded, and drops the originals
(vllm/model_executor/layers/utils.py of 0.28, line 362), so that new ones have no place to go. Without oneDNN it keeps
them. vLLM imports its logits processors before it loads a model.
"""

from vllm import _custom_ops

from hapo_lite.integrations.verl_rollout import HapoTemperature

__all__ = ["HapoTemperature"]

_custom_ops._supports_onednn = False
