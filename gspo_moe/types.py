"""Every hand-off between rooms. Shape letters: T tokens, M response tokens and N sequences of a pack.

A sequence of n tokens is fed as its first n - 1 tokens (inputs) and scored on its last n - 1 (targets), so position t
of a pack holds the input token t, the target that follows it, and the routes that the router picked for the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import torch  # reward workers import this module and must start fast


@dataclass(frozen=True)
class Message:
    """One message of a chat: who says it ("system", "user", "assistant", "tool") and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One question, as text or as the messages of a chat, not both.

    uid: names the prompt for good, `<split>/<index>` or `<split>/<file>/<row>`, no two of a split alike; seeds its
        sampling.
    text: what the model reads, as a user's message where a chat template applies, else as it is.
    task: the task that made it and rewards its answers.
    reference: what the task needs to reward an answer (JSON values only); empty when the prompt says it all.
    messages: what the model reads through its tokenizer's chat template.
    tools: what the policy may call, as JSON schemas that the template gets; with them an environment's turns are a
        tool's, else a user's.
    """

    uid: str
    text: str
    task: str
    reference: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Prompt:
        """The prompt whose `asdict` went through JSON."""
        messages = tuple(Message(**one) for one in values.get("messages", ()))
        return cls(**{**values, "messages": messages, "tools": tuple(values.get("tools", ()))})

    @property
    def shown(self) -> str:
        """For a person to read."""
        return self.text or "\n".join(f"{message.role}: {message.content}" for message in self.messages)


@dataclass(frozen=True)
class Turn:
    """What one of the two said behind the prompt; an answer's text stands without its end token or stop string.

    tokens: that the policy sampled for it, end tokens included; 0 for the environment's.
    """

    role: Literal["policy", "environment"]
    text: str
    tokens: int = 0


Conversation = tuple[Turn, ...]  # behind one prompt, in order


class Prompts(Protocol):
    """Prompts by number, the same ones in every process and run; splits are "train", "sft" and "eval"."""

    def prompt(self, split: str, index: int) -> Prompt:
        """Prompt number `index`, from 0. Raises ConfigError where there is none."""
        ...

    def size(self, split: str) -> int | None:
        """How many prompts the split has; None where they never end."""
        ...


@runtime_checkable
class OrderedPrompts(Prompts, Protocol):
    """Prompts that end, in an order of their own, each of which stands somewhere."""

    def at(self, split: str, place: int) -> tuple[int, int]:
        """(epoch, index) of the prompt at a place of the endless order, all from 0."""
        ...

    def where(self, split: str, index: int) -> str:
        """Where a person finds the prompt."""
        ...

    def skipped(self, split: str) -> Sequence[str]:
        """What was wrong with each record that is left out."""
        ...

    def kept(self, split: str, indices: Sequence[int]) -> Self:
        """The same without the split's other prompts."""
        ...


@dataclass(frozen=True)
class Reward:
    """What a rubric gave one rollout.

    total: what the policy learns from. parts: the rubric's named parts, none where it gave a number.
    error: why `total` is `task.reward.failure_reward`, with the rubric's stack trace where it raised; else None.
    timed_out: the error is that it took longer than `task.reward.timeout_seconds`, or all of them `batch_seconds`.
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    timed_out: bool = False


# stop: by an end token; length: cut off by a limit; error: its environment failed; abandoned: its source gave it up.
Finish = Literal["stop", "length", "error", "abandoned"]


@dataclass(frozen=True)
class Rollout:
    """A prompt and what followed it: one answer, or a conversation whose turns lie end to end in one sequence.

    token_ids: all of it, in order. policy_mask: one a token, 1 where the policy sampled it, end tokens included, 0 on
        prompt and environment.
    log_probs: one a sampled token, of the sampling temperature's untruncated distribution (float, nats).
    versions: (policy version, sampled tokens) of each stretch, in order; a version is how many optimizer steps the
        weights had taken that sampled.
    turns: what was said behind the prompt, as text. reward: None until a rubric has given one.
    routes: integers [tokens - 1, MoE layers, K], the experts that the engine picked for each token but the last, which
        it never fed back; None where it was not asked for them, and on ranks that the sampling one has told of it.
    """

    uid: str
    sample_index: int
    token_ids: tuple[int, ...]
    policy_mask: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Finish
    versions: tuple[tuple[int, int], ...]
    turns: Conversation = ()
    reward: Reward | None = None
    routes: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What stands before the first token that the policy sampled."""
        return self.token_ids[: self.policy_mask.index(1)]

    @property
    def response_ids(self) -> tuple[int, ...]:
        """All from there on, an environment's turns included."""
        return self.token_ids[self.policy_mask.index(1) :]

    @property
    def longest_turn(self) -> int:
        """Tokens of the policy's longest turn, which the length limit is for."""
        return max(sum(run) for sampled, run in groupby(self.policy_mask) if sampled)

    @property
    def text(self) -> str:
        """What was said behind the prompt; in a conversation, each turn behind its role."""
        if len(self.turns) == 1:
            return self.turns[0].text
        return "\n".join(f"{turn.role}: {turn.text}" for turn in self.turns)

    @property
    def total_reward(self) -> float:
        assert self.reward is not None, "no rubric has seen this rollout"
        return self.reward.total


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt, in order of `sample_index`."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(rollout.total_reward for rollout in self.rollouts)


@dataclass(frozen=True)
class TrainingSample:
    """A rollout (or a supervised example) ready for packing.

    token_ids: prompt and response together, at least two tokens.
    response_mask: 0 or 1 a token of `token_ids`; 1 on tokens the policy sampled (or is to learn).
    reward: shaped, what the advantage is made of. advantage: A_i of SPEC section 2. Both 0 for supervised samples.
    rollout_log_probs: the engine's log-prob a response token; empty for supervised samples.
    routes: the engine's, as `Rollout` has them. versions: as `Rollout` has them; empty where nobody asks.
    """

    token_ids: tuple[int, ...]
    response_mask: tuple[int, ...]
    advantage: float = 0.0
    rollout_log_probs: tuple[float, ...] = ()
    routes: torch.Tensor | None = field(default=None, compare=False, repr=False)
    reward: float = 0.0
    versions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Microbatch:
    """Whole sequences packed end to end, without padding between them.

    input_ids_T, target_ids_T, position_ids_T: int64; positions restart at 0 with each sequence.
    cu_seqlens: int64 [N + 1], bounds of the sequences in T.
    response_mask_T: float32, 1 where the *target* is a response token.
    response_positions_M: int64, where response_mask_T is 1.
    route_mask_T: bool, True where the *input* is a response token (SPEC section 4).
    advantages_N, rewards_N: float32.
    rollout_log_probs_T: float32, the engine's log-prob of the target; 0 off the response.
    sample_indices: position of each sequence in the mini-batch's sample list.
    routes_TAK: the engine's experts for each input in every MoE layer, any integer dtype; None where not reported.
    versions_T: int64, the policy version that sampled the target; -1 off the response; None where nobody asks.
    """

    input_ids_T: torch.Tensor
    target_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    response_mask_T: torch.Tensor
    response_positions_M: torch.Tensor
    route_mask_T: torch.Tensor
    advantages_N: torch.Tensor
    rollout_log_probs_T: torch.Tensor
    rewards_N: torch.Tensor
    sample_indices: tuple[int, ...]
    routes_TAK: torch.Tensor | None = None
    versions_T: torch.Tensor | None = None

    def to(self, device: torch.device) -> Microbatch:
        """The same pack with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Microbatch(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()})

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def sequence_T(self) -> torch.Tensor:
        """The index in N of each token's sequence, int64."""
        index_N = self.position_ids_T.new_tensor(range(self.num_sequences))
        return index_N.repeat_interleave(self.cu_seqlens.diff())
