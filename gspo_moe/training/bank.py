"""Makes a bank: the rollouts that the steps of a run would make if its policy never changed."""

from __future__ import annotations

from pathlib import Path

from gspo_moe.config.outputs import output_fault
from gspo_moe.data.prompts import PromptSource
from gspo_moe.errors import ConfigError
from gspo_moe.observability.progress import Progress
from gspo_moe.rollout.answers import ScoredGroup
from gspo_moe.rollout.bank import SAMPLING, Bank, write_bank
from gspo_moe.training.collect import sample
from gspo_moe.training.session import Plan, open_session


def make_bank(plan: Plan, path: Path) -> int:
    """Answers the prompts of `schedule.steps` steps into the file `path`; how many prompts. Collective.

    Raises ConfigError for a file that exists or cannot be written.
    """
    if path.is_file():
        raise ConfigError(f"{path} exists, and runs may rest on its rollouts; name another file, or remove it")
    fault = output_fault(path)
    if fault is not None:
        raise ConfigError(fault)
    config, session = plan.config, open_session(plan)
    source = PromptSource(plan.task.prompts, "train")
    groups: list[ScoredGroup] = []
    with Progress(config.schedule.steps, enabled=session.groups.is_main and config.logging.progress) as progress:
        for step in range(config.schedule.steps):
            prompts = source.take(config.rollout.prompts_per_step)
            groups += sample(session, prompts, step, policy_version=0).groups
            source.done(prompts)
            progress.update(step + 1, {})
    session.close()
    if session.groups.is_main:
        sampling = {key: getattr(config.rollout, key) for key in SAMPLING}
        write_bank(path, Bank(tuple(groups), sampling | {"vocab_size": plan.tokenizer.vocab_size}))
    return len(groups)
