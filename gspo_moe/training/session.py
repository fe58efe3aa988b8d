"""Everything one run holds, put together in the order in which the parts need each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config
from gspo_moe.data.prompts import PromptSource
from gspo_moe.data.rendering import Renderer
from gspo_moe.data.tokenizers import Tokenizer
from gspo_moe.evaluation.evaluate import evaluate, held_out_prompts
from gspo_moe.model.build import Model, build_model
from gspo_moe.model.initial import load_initial_weights
from gspo_moe.model.weights import draw_value_head
from gspo_moe.observability.no_learning import NoLearning
from gspo_moe.observability.reward_errors import RewardErrors
from gspo_moe.observability.timers import Timers
from gspo_moe.parallel.groups import Groups, initialize
from gspo_moe.parallel.signals import StopSignals, start_resource_tracker
from gspo_moe.platform import device
from gspo_moe.rollout.answers import Answerer, share_of
from gspo_moe.rollout.bank import read_bank
from gspo_moe.rollout.embedded.engine import MegatronEngine
from gspo_moe.rollout.embedded.numerics import rounded_copy
from gspo_moe.rollout.engine import WeightSink, make_stop_ids
from gspo_moe.rollout.queue import GroupQueue, Pace
from gspo_moe.rollout.servers.ahead import ServerSource
from gspo_moe.rollout.servers.engine import ServerEngine
from gspo_moe.rollout.servers.opening import Opened, open_servers
from gspo_moe.rollout.source import AheadSource, BankSource, EngineSource, RolloutSource
from gspo_moe.rollout.stop_strings import make_stop_strings
from gspo_moe.routing.recorder import RouteRecorder
from gspo_moe.tasks.pool import TaskPool
from gspo_moe.tasks.protocol import Task
from gspo_moe.tasks.rewards import is_batched
from gspo_moe.training.checkpoint import BegunSave, Progress
from gspo_moe.training.guard import Guard
from gspo_moe.training.optimizer import Optimizer
from gspo_moe.training.packs import TrainingPack
from gspo_moe.training.replicas import ReplicaCheck
from gspo_moe.training.roll_backs import RollBack
from gspo_moe.training.servers import make_sink
from gspo_moe.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class Plan:
    """What is settled before any process group starts; making one raises ConfigError for what cannot work."""

    config: Config
    layout: Layout
    architecture: Architecture
    renderer: Renderer
    task: Task

    @property
    def tokenizer(self) -> Tokenizer:
        return self.renderer.tokenizer


@dataclass
class Session:
    """A policy with all it needs to answer prompts; training adds an optimizer to it.

    sink: takes the weights that `source` is to sample with. stop: signals to end it.
    servers: of `rollout.engine`, None where that is the trainer itself.
    """

    plan: Plan
    groups: Groups
    model: Model
    answerer: Answerer
    sink: WeightSink
    stop_ids: frozenset[int]
    timers: Timers
    stop: StopSignals
    servers: Opened | None = None

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def run_path(self) -> Path:
        return self.plan.config.run_path

    @cached_property
    def source(self) -> RolloutSource:
        """Of training's rollouts: `rollout.bank`, or the policy's engine."""
        config = self.config
        if self.ahead is not None:
            return self.ahead
        if config.rollout.bank is not None:
            bank = read_bank(config.rollout.bank)
            return BankSource(bank, lambda prompts: share_of(prompts, self.groups.data_context))
        return EngineSource(self.answerer, config, self.stop_ids, self.timers)

    @cached_property
    def ahead(self) -> AheadSource | None:
        """The source, where it goes on while training runs."""
        if not self.config.rollout.max_staleness:
            return None
        assert self.servers is not None
        return ServerSource(self.servers.fleet, self.answerer, self.config, self.stop_ids, self.timers, self.stop)

    def queue(self, prompts: PromptSource) -> GroupQueue:
        """Of answers to these prompts."""
        return GroupQueue(prompts, self.source, Pace.of(self.config), self.groups.data_context, self.ahead)

    @cached_property
    def reward_errors(self) -> RewardErrors:
        reward = self.config.task.reward
        return RewardErrors(
            self.config.run_path,
            self.groups.is_main,
            reward.allow_all_failed,
            reward.max_failure_rate,
            reward.max_failed_batches,
        )

    @cached_property
    def no_learning(self) -> NoLearning:
        return NoLearning(self.groups.is_main)

    @cached_property
    def held_out(self) -> list[Prompt]:
        return held_out_prompts(self.config, self.plan.task)

    def evaluate(self, when: str) -> list[RolloutGroup]:
        """Answers the held-out prompts with the weights as they are. Collective. Raises as `RewardErrors.check`."""
        groups = evaluate(self.config, self.answerer, self.held_out, self.stop_ids)
        self.reward_errors.check(groups, f"evaluation {when}")
        return groups

    def publish(self, version: int) -> Mapping[str, float]:
        """Gives the model's weights to whoever samples; metrics of it. version: updates they have taken. Collective."""
        return self.sink.publish(self.model, version)

    def server_metrics(self) -> dict[str, float]:
        """What rollout servers did since the last call; empty where there are none. Collective."""
        engine = self.answerer.engine
        return engine.metrics() if isinstance(engine, ServerEngine) else {}

    def close(self) -> None:
        ahead: AheadSource | None = vars(self).get("ahead")  # if it was ever asked for
        if ahead is not None:
            ahead.close()
        self.answerer.pool.close()
        if self.servers is not None and self.servers.fleet is not None:
            self.servers.fleet.close()


def open_session(plan: Plan, stop: StopSignals | None = None) -> Session:
    """Joins the process group, builds the model and fills in its first weights. Collective.

    stop: entered by the caller where signals are to end the session's work; None for a session that they just end.
    """
    config = plan.config
    groups = initialize(plan.layout, config.seed, config.parallel.timeout_minutes)
    vocab, servers = plan.tokenizer.vocab_size, None
    if config.rollout.engine != "megatron":
        servers = open_servers(config, plan.architecture, plan.tokenizer, groups)
    model = build_model(config, plan.architecture, groups, vocab=vocab, value_head=config.has_value_head)
    draw_value_head(model, config.seed)
    load_initial_weights(config, model)
    stop, rollout = stop or StopSignals(), config.rollout
    longest = config.schedule.micro_batch_tokens
    engine: MegatronEngine | ServerEngine
    if servers is None:
        rounded = rounded_copy(config, model)
        engine = MegatronEngine(model, rollout.max_batch, longest, stop, rollout.cuda_graph, rounded)
    else:
        sink = make_sink(config, servers, vocab)
        engine = ServerEngine(servers.fleet, sink, groups, min(longest, servers.longest), stop)
    answerer = Answerer(
        engine,
        plan.renderer,
        TaskPool(config.task, config.seed, batched=is_batched(plan.task.rubric)),
        groups,
        max_turns=None if plan.task.single_turn else rollout.max_turns,
        stop_strings=make_stop_strings(plan.tokenizer, rollout.stop),
    )
    if config.evaluation.prompts or (config.stage == "rl" and rollout.bank is None):
        start_resource_tracker()  # before the workers do, whose would let SIGUSR1 end it
        answerer.start_workers()
    return Session(
        plan=plan,
        groups=groups,
        model=model,
        answerer=answerer,
        sink=engine,
        stop_ids=make_stop_ids(plan.tokenizer, config.rollout.stop),
        timers=Timers(device().synchronize),
        stop=stop,
        servers=servers,
    )


@dataclass
class Trainer:
    """A session under training. `progress` is where it stands; `recorder` is None when routing.record is off.

    reference: the frozen policy of a KL penalty, None without one.
    probe_packs: this rank's packs of the probe set, once the first probe has fixed it.
    roll_backs: how the run was taken back so far.
    dumped_weights: where weights were kept last for a skipped mini-batch, behind the steps that Adam had taken.
    saving: the checkpoint that is being written. given_up: one whose writer took too long, and may go on.
    failed_saves: since this start.
    """

    session: Session
    optimizer: Optimizer
    recorder: RouteRecorder | None
    progress: Progress
    reference: Model | None = None
    probe_packs: list[TrainingPack] | None = None
    roll_backs: tuple[RollBack, ...] = ()
    dumped_weights: tuple[int, str] | None = None
    saving: BegunSave | None = None
    given_up: BegunSave | None = None
    failed_saves: int = 0

    @cached_property
    def guard(self) -> Guard:
        return Guard(self.session.config.guard)

    @cached_property
    def replicas(self) -> ReplicaCheck:
        """Its making is collective."""
        return ReplicaCheck(self.session.model, self.session.answerer.engine, self.optimizer.predictor)

    @cached_property
    def prompts(self) -> PromptSource:
        """Those of training, from where `progress` stands when they are first asked for."""
        split = "train" if self.session.config.stage == "rl" else "sft"
        return PromptSource(self.session.plan.task.prompts, split, self.progress.prompts)

    @cached_property
    def queue(self) -> GroupQueue:
        """Of the groups to come."""
        return self.session.queue(self.prompts)

    def forget_prompts(self) -> None:
        """Gives up all that was asked for; the next step asks anew from where `progress` stands then."""
        if self.session.ahead is not None:
            self.session.ahead.close()
        vars(self).pop("queue", None)
        vars(self).pop("prompts", None)

    def finish_step(self, prompts: Iterable[Prompt], updates: int) -> Mapping[str, float]:
        """Moves on behind a step that used these prompts up, and hands its weights to the next rollouts. Collective.

        Returns metrics of the latter.
        """
        self.prompts.done(prompts)
        position, before = self.prompts.position, self.progress
        self.progress = replace(
            before,
            step=before.step + 1,
            prompt_position=position.next,
            prompts_pending=position.pending,
            policy_version=before.policy_version + updates,
        )
        return self.session.publish(self.progress.policy_version)

    @property
    def unfinished(self) -> bool:
        return self.progress.step < self.session.config.schedule.steps or self.progress.evaluation_due

    @property
    def checkpoints(self) -> Path:
        return self.session.run_path / "checkpoints"
