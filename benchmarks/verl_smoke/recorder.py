"""The trainer of `trainer_mode=hapo`, which also writes down what it hands on: one file for a batch and a loss.

`iteration-N.pt` holds the rows of a batch as verl's trainer has them before the update. `loss-K-R.pt` holds the K-th
micro-batch of process R: its rows, their log-probabilities and verl's loss.
"""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transfer_queue
from verl.trainer.ppo.v1 import register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import no_padding_2_padding

from hapo_lite.integrations.verl_cluster import HapoTrainer, ppo_loss_with_h

FIELDS = ["uid", "prompts", "responses", "rm_scores", "rollout_log_probs", "old_log_probs"]
FIELDS += ["entropy", "hapo_h", "advantages"]
ROW = "row"
_micro_batches = itertools.count()


def recorded_loss(
    config: Any, model_output: Any, data: Any, dp_group: Any = None, folder: str = ""
) -> tuple[torch.Tensor, dict[str, Any]]:
    """`ppo_loss_with_h`, and a file with its rows, log-probabilities and result."""
    loss, metrics = ppo_loss_with_h(config, model_output, data, dp_group)
    rows = [int(row) for row in data[ROW].unbind()]
    log_probs = no_padding_2_padding(model_output["log_probs"], data).detach()
    counts = data["response_mask"].offsets().diff().tolist()
    record = {
        "rows": rows,
        "log_probs": [row[:n].clone() for row, n in zip(log_probs, counts, strict=True)],
        "loss": float(loss.detach()),
        "tokens": int(data["batch_num_tokens"]),
        "processes": int(data["dp_size"]),
    }
    torch.save(record, Path(folder) / f"loss-{next(_micro_batches):03d}-{os.environ['RANK']}.pt")
    return loss, metrics


@register_trainer("hapo_recorded")
class RecordedTrainer(HapoTrainer):
    """`HapoTrainer`, unchanged but for the files."""

    def on_init_end(self) -> None:
        super().on_init_end()
        self.folder = Path(self.config.trainer.default_local_dir) / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(recorded_loss, config=actor, folder=str(self.folder)))

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        found = transfer_queue.kv_batch_get(**where, select_fields=FIELDS)
        rows = torch.arange(len(batch))[:, None]
        # The batch that comes back names the new field, so that verl hands it to the processes.
        with_rows = transfer_queue.kv_batch_put(**where, fields=found.empty().update({ROW: rows}))
        record: dict[str, Any] = {"uid": found.pop("uid").tolist()}
        record |= {name: [row.clone() for row in values.unbind()] for name, values in found.items()}
        torch.save(record, self.folder / f"iteration-{self.global_steps}.pt")
        return super()._update_actor(with_rows, metrics)
