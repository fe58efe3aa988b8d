"""What a mini-batch held whose update was skipped: one safetensors file a rank, for a look after the run.

Tensors are those of `types.Microbatch` and the old policy's, `pack_0/input_ids_T` and so on; the metadata's `minibatch`
is JSON: step, mini_batch, policy_version, rank, grad_norm, num_sequences, num_tokens, and for each pack its samples.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gspo_moe.files import write_whole
from gspo_moe.training.packs import Minibatch
from gspo_moe.training.session import Trainer
from gspo_moe.training.step import MinibatchResult
from gspo_moe.types import Microbatch

FOLDER = "skipped"
MOST = 20  # files a rank keeps: all of a run's may be skipped
OF_OLD_POLICY = ("old_log_probs_T", "reference_log_probs_T", "replay_TLK", "gates_TLK", "held_TL")
_log = logging.getLogger(__name__)


def dump_skipped(trainer: Trainer, minibatch: Minibatch, result: MinibatchResult, number: int) -> None:
    """Writes this rank's packs of mini-batch `number`, from 0, into the run's folder `skipped`, as far as it has room.

    Only the last stage, which has log-probs, writes, and of the tensor-parallel ranks the first. A file that cannot be
    written is no reason to end the run.
    """
    groups, folder = trainer.session.groups, trainer.session.run_path / FOLDER
    if not groups.is_last_stage or groups.tensor.rank():
        return
    own = f"rank_{groups.rank:05d}.safetensors"
    if len(list(folder.glob(f"*{own}"))) >= MOST:
        return
    step = trainer.progress.step + 1
    described = {
        "step": step,
        "mini_batch": number + 1,
        "policy_version": trainer.progress.policy_version,
        "rank": groups.rank,
        "grad_norm": str(result.update.grad_norm),
        "num_sequences": minibatch.num_sequences,
        "num_tokens": minibatch.num_tokens,
        "samples": [list(one.pack.sample_indices) for one in minibatch.packs],
    }
    file = folder / f"step_{step:08d}_mini_batch_{number + 1}_{own}"
    tensors = _tensors(minibatch, result)
    try:
        write_whole(file, lambda partial: save_file(tensors, partial, metadata={"minibatch": json.dumps(described)}))
    except (OSError, SafetensorError) as error:
        _log.warning("%s cannot be written (%s): what the mini-batch held is not kept", file, error)


def _tensors(minibatch: Minibatch, result: MinibatchResult) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for number, (one, trained) in enumerate(zip(minibatch.packs, result.packs, strict=True)):
        values = {field.name: getattr(one.pack, field.name) for field in fields(Microbatch)}
        values |= {name: getattr(one, name) for name in OF_OLD_POLICY} | {"log_probs_T": trained.log_probs_T}
        found |= {f"pack_{number}/{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    # Copies: safetensors takes no two names of the same memory.
    return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}
