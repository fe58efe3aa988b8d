"""Makes a bank: the rollouts that the steps of a run would make if its policy never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gspo_moe.config.outputs import output_fault
from gspo_moe.data.prompts import PromptSource
from gspo_moe.errors import ConfigError
from gspo_moe.observability.progress import Progress
from gspo_moe.parallel.exchange import exchange_rows
from gspo_moe.parallel.stop import on_main
from gspo_moe.rollout.answers import all_rollouts
from gspo_moe.rollout.bank import SAMPLING, Bank, write_bank
from gspo_moe.training.session import Plan, Session, open_session
from gspo_moe.types import RolloutGroup


def make_bank(plan: Plan, path: Path, *, overwrite: bool = False) -> int:
    """Answers the prompts of `schedule.steps` steps into the file `path`; how many prompts. Collective.

    Raises ConfigError for a file that exists, unless told to `overwrite` it, or cannot be written.
    """
    if path.is_file() and not overwrite:
        raise ConfigError(
            f"{path} exists, and runs may rest on its rollouts; name another file, or replace it with --overwrite"
        )
    fault = output_fault(path)
    if fault is not None:
        raise ConfigError(fault)
    config, session = plan.config, open_session(plan)
    try:
        kept = _answered(plan, session)
        sampling = {key: getattr(config.rollout, key) for key in SAMPLING}
        bank = Bank(tuple(kept), sampling | {"vocab_size": plan.tokenizer.vocab_size})
        on_main(lambda: write_bank(path, bank))
    finally:
        session.close()
    return len(kept)


def _answered(plan: Plan, session: Session) -> list[RolloutGroup]:
    config = plan.config
    session.publish(0)
    source, kept = PromptSource(plan.task.prompts, "train"), list[RolloutGroup]()
    queue = session.queue(source)
    with Progress(config.schedule.steps, enabled=session.groups.is_main and config.logging.progress) as progress:
        for step in range(config.schedule.steps):
            groups = queue.draw(step, version=0)
            session.reward_errors.check(groups, f"step {step + 1}")
            source.done(group.prompt for group in groups)
            kept += _with_routes_on_main(session, groups)
            progress.update(step + 1, {})
    return kept


def _with_routes_on_main(session: Session, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups, on the main process with the routes that others have. Collective."""
    if not session.config.routing.reports_engine_routes:
        return list(groups)
    rollouts, ranks = all_rollouts(groups), session.groups.data_context
    mine = {i: one.routes for i, one in enumerate(rollouts) if one.routes is not None}
    wanted = [range(len(rollouts)) if rank == 0 else () for rank in range(ranks.size())]
    found = exchange_rows(mine, [len(one.token_ids) - 1 for one in rollouts], wanted, ranks)
    whole = iter([replace(one, routes=found.get(i)) for i, one in enumerate(rollouts)])
    return [replace(each, rollouts=tuple(next(whole) for _ in each.rollouts)) for each in groups]
