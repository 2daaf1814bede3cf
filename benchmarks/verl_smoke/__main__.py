"""Two iterations of recipes/verl/hapo_qwen7b.sh on this machine's CPU, and a comparison with the kit's own functions.

    make verl-smoke                                    # makes .venv-verl first
    python -m benchmarks.verl_smoke .venv-verl/bin [--folder runs/verl_smoke]

The recipe runs as on a cluster: a Ray head, verl's synchronous trainer under `trainer_mode=hapo`, two training
processes, two vLLM servers. The bundled model stands in for 7B. What differs from a cluster is in `ON_A_CPU` and
`cpu.py`. It takes about 10 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas

from benchmarks.verl_smoke.check import Check, checks
from hapo_lite import load_policy, load_recipe
from hapo_lite.model.policy import Policy
from hapo_lite.tiny.task import problems

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "hapo_lite" / "tiny" / "model"
ITERATIONS = 2

SMALL = [
    "trainer.v1.trainer_mode=hapo_recorded",  # hapo, which also writes down what it hands on
    f"trainer.total_training_steps={ITERATIONS}",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
    "trainer.resume_mode=disable",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",  # two optimiser steps an iteration
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "data.max_prompt_length=64",
    "data.max_response_length=32",
    "actor_rollout_ref.rollout.max_model_len=256",
    "actor_rollout_ref.rollout.max_num_batched_tokens=1024",
    "actor_rollout_ref.rollout.max_num_seqs=32",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",  # several micro-batches a step
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    f"reward.custom_reward_function.path={Path(__file__).parent / 'reward.py'}",
]
"""The sizes of the bundled model."""

ON_A_CPU = [
    "trainer.device=cpu",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.free_cache_engine=false",
    "+actor_rollout_ref.rollout.enable_sleep_mode=false",
    "actor_rollout_ref.rollout.load_format=auto",
    f"+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes={64 << 20}",
    'actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=["benchmarks.verl_smoke.sampler:HapoTemperature"]',
]
"""Without a GPU there is no flash attention, nothing to compile for and no memory to hand back."""

WORKERS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Environment of the processes that Ray starts."""

HEAD = {
    "PYTHONUNBUFFERED": "1",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",
}
"""Environment of the Ray head. A busy machine needs more than the seconds that Ray waits for a process."""


@contextlib.contextmanager
def ray_head(binaries: Path, environment: dict[str, str]) -> Iterator[None]:
    """A Ray head, which tells its processes of two GPUs that do not exist: verl asks for one a training process."""
    command = [binaries / "ray", "start", "--head", "--block", "--num-cpus=16", "--num-gpus=2"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    told = {"env": environment | HEAD, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    head = subprocess.Popen(command, **told)
    try:
        for line in head.stdout or ():
            if "Ray runtime started" in line:
                break
        else:
            raise SystemExit("Ray did not start: its logs are in session_latest of its temporary folder")
        yield
    finally:
        head.terminate()
        head.wait(60)


def write_problems(folder: Path) -> dict[str, str]:
    """The bundled problems in verl's format; the variables that hapo_qwen7b.sh reads."""
    files = {}
    for variable, split in (("TRAIN", "train"), ("VAL", "test")):
        rows = [
            {
                "data_source": "tiny",
                "prompt": [{"role": "user", "content": problem.prompt}],
                "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
                "extra_info": {"index": i},
            }
            for i, problem in enumerate(problems(split)[:64])
        ]
        files[variable] = str(folder / f"{split}.parquet")
        pandas.DataFrame(rows).to_parquet(files[variable])
    return files


def run_verl(binaries: Path, folder: Path) -> None:
    """Run the recipe's script; what it prints goes to verl.log. Exits with the end of the log if verl fails."""
    everywhere = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    driver = everywhere | WORKERS | write_problems(folder)
    driver |= {"RAY_ADDRESS": "auto", "PLUGIN": "benchmarks.verl_smoke.plugin", "GPUS": "2", "MODEL": str(MODEL)}
    variables = [f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}='{value}'" for name, value in WORKERS.items()]
    places = [f"trainer.default_local_dir={folder}", f"hydra.run.dir={folder / 'hydra'}"]
    log = folder / "verl.log"
    command = [ROOT / "recipes" / "verl" / "hapo_qwen7b.sh", *variables, *SMALL, *ON_A_CPU, *places]
    with ray_head(binaries, everywhere), log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, env=driver, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise SystemExit("\n".join([*tail, f"verl stopped; the whole output is in {log}"]))


def policy_of(model: Path) -> Policy:
    """The kit's policy with a model's weights, in fp32."""
    overrides = [f"model.name={model}", "model.quantization=none", "model.dtype=fp32"]
    return load_policy(load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", overrides).model, seed=0, device="cpu")


def show(found: list[Check]) -> None:
    print(f"{'compared':<42} {'numbers':>7} {'largest difference':>18} {'allowed':>8}")
    for check in found:
        print(
            f"{check.what:<42} {check.count:>7} {check.found:>18.1e} {check.allowed:>8.0e} "
            f"{'' if check.passed else 'DIFFERS '}{check.note}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("binaries", type=Path, help="the bin folder of an environment with verl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "verl_smoke", help="where files are written")
    parser.add_argument("--check-only", action="store_true", help="compare what an earlier run wrote down")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    started = time.monotonic()
    if not arguments.check_only:
        for old in (folder / "records").glob("*.pt"):
            old.unlink()
        (folder / "records").mkdir(parents=True, exist_ok=True)
        run_verl(arguments.binaries.resolve(), folder)
    weights = [MODEL, *(folder / f"global_step_{n}" / "actor" / "huggingface" for n in range(1, ITERATIONS))]
    found = list(checks(folder / "records", [policy_of(model) for model in weights]))
    show(found)
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
