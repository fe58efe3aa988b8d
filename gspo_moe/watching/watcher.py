"""Takes down what a model's routers pick, by forward hooks that stand only while something is captured.

Shape letters: T tokens fed, M those of them that count, L MoE layers, K experts a token, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from gspo_moe.errors import ConfigError, DataError
from gspo_moe.watching.gates import Gate, find_gate, margin
from gspo_moe.watching.routers import Choice, Router, find_routers
from gspo_moe.watching.snapshot import Snapshot, TokenMasks

AT_ONCE = 256  # tokens whose probabilities over the whole vocabulary are in memory, 156 MB of Qwen3's


def watch(model: torch.nn.Module, *, scores: bool = True) -> Watcher:
    """A watcher of a model's routers: transformers' MoE models, or a rank's part of one on megatron-core.

    scores: also keep each router's scores, 4 * E bytes a token that counts and layer, of which margins and the router's
    shift come. Raises ConfigError for a model without a router of a known form.
    """
    return Watcher(model, scores=scores)


@dataclass(frozen=True)
class _Found:
    """One router's forward: experts of all tokens, scores and margins of those that count."""

    routes_TK: torch.Tensor
    num_experts: int
    log_scores_ME: torch.Tensor | None
    margin_M: torch.Tensor | None
    scored_by: str | None


class Capture:
    """What is found while `Watcher.capture` is open: one forward."""

    def __init__(self, names: tuple[str, ...], masks: TokenMasks) -> None:
        self._names = names
        self._masks = masks
        self._found: dict[str, _Found] = {}

    def add(self, name: str, found: _Found) -> None:
        if name in self._found:
            raise DataError(
                f"{name} ran twice in one capture; capture one forward each, leave the backward pass (which may run it "
                "again) outside, and join the snapshots of several micro-batches"
            )
        self._found[name] = found

    def snapshot(self) -> Snapshot:
        """Of the forward that ran. Raises DataError where a router did not run, or not with as many experts."""
        absent = [name for name in self._names if name not in self._found]
        if absent:
            raise DataError(f"{absent[0]} did not run; run one forward of the watched model inside the capture")
        layers = [self._found[name] for name in self._names]
        shapes = {(one.num_experts, one.routes_TK.shape[1]) for one in layers}
        if len(shapes) > 1:
            raise DataError(f"the layers' experts and topk differ, {sorted(shapes)}; such a model has no one figure")
        scored = [(one.log_scores_ME, one.margin_M, one.scored_by) for one in layers]
        scores = [(a, b, c) for a, b, c in scored if a is not None and b is not None and c is not None]
        whole = len(scores) == len(layers)
        return Snapshot(
            self._masks,
            torch.stack([one.routes_TK for one in layers], dim=1),
            layers[0].num_experts,
            self._names,
            torch.stack([log_scores for log_scores, _, _ in scores], dim=1) if whole else None,
            torch.stack([at for _, at, _ in scores], dim=1) if whole else None,
            scored_by=tuple(name for _, _, name in scores) if whole else None,
        )


class Watcher:
    """Made by `watch`. Costs nothing while nothing is captured."""

    def __init__(self, model: torch.nn.Module, *, scores: bool = True) -> None:
        self._model = model
        self._routers = find_routers(model)
        self._scores = scores
        self._gates: dict[str, Gate] = {}  # by the routers' names, as the first forward showed them

    @property
    def layers(self) -> tuple[str, ...]:
        """The routers' names, in the order of a snapshot's layers."""
        return tuple(self._routers)

    @contextlib.contextmanager
    def capture(
        self,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor | None = None,
        *,
        routes: torch.Tensor | None = None,
    ) -> Iterator[Capture]:
        """While open, one forward of the model by whoever runs it.

        attention_mask, response_mask: [rows, tokens] of what is fed, as `TokenMasks.of` takes them.
        routes: experts [tokens fed, layers, topk] of an integer type, `routes_TLK` of an earlier snapshot, which the
        routers take in place of their own choice and the capture then has; weights are the live router's, without a
        gradient. Raises ConfigError where these follow an unknown rule, DataError for routes of other tokens.
        """
        masks = TokenMasks.of(attention_mask, response_mask)
        rows, tokens = attention_mask.shape
        if routes is not None and routes.shape[:2] != (rows * tokens, len(self._routers)):
            raise DataError("the routes to hold are of other tokens or layers; take them of the same batch")
        held = [None] * len(self._routers) if routes is None else routes.unbind(dim=1)
        captured = Capture(self.layers, masks)
        handles = [
            router.module.register_forward_hook(
                _Hook(captured, name, router, attention_mask, masks, self._scores, layer_TK, self._gates)
            )
            for (name, router), layer_TK in zip(self._routers.items(), held, strict=True)
        ]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def snapshot(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        *,
        routes: torch.Tensor | None = None,
        log_probs: bool = True,
        **inputs: Any,
    ) -> Snapshot:
        """Of one forward of a transformers model, without gradients and in its evaluation mode, which it leaves again.

        input_ids and the masks: [rows, tokens]; routes: as in `capture`; inputs: more of the model's arguments.
        log_probs: also keep the log-prob of each next token, of the model's logits.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        evaluation = evaluating(self._model)
        with evaluation, torch.no_grad(), self.capture(real, response_mask, routes=routes) as captured:
            output = self._model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        found = replace(captured.snapshot(), token_ids_T=input_ids.detach().flatten().cpu())
        return replace(found, log_probs_T=next_log_probs(output.logits, input_ids)) if log_probs else found


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; behind it each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Hook:
    captured: Capture
    name: str
    router: Router
    attention_mask: torch.Tensor
    masks: TokenMasks
    scores: bool
    routes_TK: torch.Tensor | None
    gates: dict[str, Gate]

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        choice = self._by_rows(self.router.choice(arguments, output))
        gate = self._gate(choice)
        forced = output
        if self.routes_TK is not None:
            if gate is None:
                raise ConfigError(f"{self.name}: its weights follow no rule known here, so its routes cannot be held")
            held_TK = self.routes_TK.long().to(choice.logits_TE.device)
            choice = replace(choice, routes_TK=held_TK, weights_TK=gate.weights(choice.logits_TE, held_TK))
            in_order = self._by_rows(choice, back=True)
            assert in_order.weights_TK is not None
            forced = self.router.forced(output, in_order.routes_TK, in_order.weights_TK)
        self.captured.add(self.name, self._found(choice, gate if self.scores else None))
        return forced

    def _gate(self, choice: Choice) -> Gate | None:
        """One for all forwards: near ties of logits fit several."""
        if self.name not in self.gates:
            gate: Gate | None = Gate("softmax", True, 1.0)
            if choice.weights_TK is not None:
                real_T = self.attention_mask.detach().bool().flatten().to(choice.logits_TE.device)
                gate = find_gate(choice.logits_TE[real_T], choice.routes_TK[real_T], choice.weights_TK[real_T])
            if gate is None:
                return None
            self.gates[self.name] = gate
        return self.gates[self.name]

    def _by_rows(self, choice: Choice, *, back: bool = False) -> Choice:
        """The choice with its tokens row by row, as all but megatron-core's have them; `back` in the router's order."""
        rows, tokens = self.attention_mask.shape
        if len(choice.logits_TE) != rows * tokens:
            raise DataError(
                f"{self.name} saw {len(choice.logits_TE)} tokens, the mask has {rows} rows of {tokens}; give the mask "
                "of what this process feeds (under sequence or context parallelism, of its own part)"
            )
        if not self.router.sequence_first or rows == 1:
            return choice
        outer = (rows, tokens) if back else (tokens, rows)

        def turned(values: torch.Tensor) -> torch.Tensor:
            return values.view(*outer, -1).transpose(0, 1).flatten(0, 1)

        weights_TK = None if choice.weights_TK is None else turned(choice.weights_TK)
        return replace(
            choice, logits_TE=turned(choice.logits_TE), routes_TK=turned(choice.routes_TK), weights_TK=weights_TK
        )

    def _found(self, choice: Choice, gate: Gate | None) -> _Found:
        experts, routes_TK = choice.logits_TE.shape[1], choice.routes_TK
        kept_TK = routes_TK.short().cpu()
        if gate is None:
            return _Found(kept_TK, experts, None, None, None)
        counts_T = self.masks.routes_T.to(routes_TK.device)
        log_scores_ME = gate.log_scores(choice.logits_TE[counts_T])
        scores_ME = log_scores_ME.exp() if choice.bias_E is None else log_scores_ME.exp() + choice.bias_E
        margin_M = margin(scores_ME, routes_TK[counts_T], choice.groups)
        return _Found(kept_TK, experts, log_scores_ME.cpu(), margin_M.cpu(), gate.scores)


def next_log_probs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """ln p of the token behind each one (nats), float32 [T] row by row; 0 at the end of a row.

    logits: [rows, tokens, vocabulary], of which few tokens at a time take the room of a softmax.
    """
    found = torch.zeros(input_ids.shape)
    for row, ids in enumerate(input_ids):
        for start in range(0, len(ids) - 1, AT_ONCE):
            targets = ids[start + 1 : start + 1 + AT_ONCE]
            behind = slice(start, start + len(targets))
            found[row, behind] = log_probs_of(logits[row, behind].detach(), targets)
    return found.flatten()


def log_probs_of(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """ln p of these tokens (nats), float32 [T] on the CPU; logits over the vocabulary V."""
    log_probs_TV = logits_TV.float().log_softmax(dim=-1)
    return log_probs_TV.gather(1, targets_T[:, None].to(logits_TV.device))[:, 0].cpu()
