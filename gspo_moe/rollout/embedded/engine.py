"""The embedded rollout engine: samples from the training weights themselves, or a rounded copy, with a KV cache.

Strategy: prompts are prefilled once each, their cache rows copied to their samples, then every step feeds one token of
each unfinished sample (`rollout.embedded.decoder`), through `rollout.embedded.lean` where it can. Finished samples
leave the batch, and the last rows' samples take their places, so that the unfinished ones have the first rows of the
cache. Invariants: where experts span data-parallel ranks, every rank runs the same number of steps (a rank with nothing
left feeds no token); each rank goes on behind a fault of one of them, which all raise at the end; a sample depends on
its request's uid, its index and the seed alone.

Shape letters: N sequences in the batch, V vocabulary, R response tokens at most, A MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from gspo_moe.errors import RolloutError
from gspo_moe.model.build import Model
from gspo_moe.model.cache import KVCache
from gspo_moe.model.forward import no_recording, run
from gspo_moe.model.inputs import ModelInput
from gspo_moe.model.last_stage import LastStage
from gspo_moe.parallel.reduce import most
from gspo_moe.parallel.signals import StopSignals
from gspo_moe.parallel.stop import largest, raise_everywhere
from gspo_moe.platform import device
from gspo_moe.rollout.embedded.decoder import POSITIONS_MULTIPLE, Decoder, StepInput, StepOutput, warn_of_whole_forward
from gspo_moe.rollout.embedded.expert_ranks import experts_holders
from gspo_moe.rollout.embedded.graphs import make_graphs
from gspo_moe.rollout.embedded.lean import LeanForward, gather_vocab, lean_obstacle
from gspo_moe.rollout.embedded.numerics import RoundedCopy
from gspo_moe.rollout.embedded.samples import Sample, Samples, cut_routes, in_batches, in_packs, misfit
from gspo_moe.rollout.embedded.sampling import sample, uniforms
from gspo_moe.rollout.engine import Ended, Request, SamplingParams
from gspo_moe.routing.comparison import gather_layers
from gspo_moe.routing.recorder import RoutePass, RouteRecorder
from gspo_moe.types import Rollout

Tell = Callable[[Samples, Sequence[int]], None]
CHECK_TOKENS = 64  # decoded between two looks for a signal to stop
MEETING_TOKENS = 4 * CHECK_TOKENS
# Tokens decoded between two looks for answers that ended: a GPU would be waited for, a CPU would decode for nothing.
ENDS_INTERVAL = {"cpu": 1, "cuda": 8}


class MegatronEngine:
    """Generates with a Model in place; decodes `max_batch` sequences at once, prefills `prefill_tokens` a pack.

    stop: ends generation at a signal. cuda_graph: as `rollout.cuda_graph`. rounded: what it generates with in the
    model's place, with its weights as they were last published.
    """

    def __init__(
        self,
        model: Model,
        max_batch: int,
        prefill_tokens: int,
        stop: StopSignals | None = None,
        cuda_graph: str = "auto",
        rounded: RoundedCopy | None = None,
    ) -> None:
        self._policy = model
        self._rounded = rounded
        self._model = model if rounded is None else rounded.model
        self._ranks = model.groups.data_context
        # They decode each token together where they share experts, or megatron-core's own dispatch counts their tokens.
        counted = model.config.moe_token_dispatcher_type == "allgather" and lean_obstacle(self._model) is not None
        self._in_unison = counted or len(set(experts_holders(model.groups))) > 1
        self._stop = stop or StopSignals()
        self._fault: RolloutError | None = None
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._cuda_graph = cuda_graph
        self._device = device().torch_device
        self._interval = ENDS_INTERVAL[self._device.type]
        self._recorder: RouteRecorder | None = None
        self.version = 0

    def publish(self, model: Model, version: int) -> dict[str, float]:
        """Takes note of the version: the weights are the model's own, unless they are rounded now."""
        assert model is self._policy
        if self._rounded is not None:
            self._rounded.take(model)
        self.version = version
        return {}

    def differing(self) -> list[str]:
        """Which weights of a rounded copy are not those that were published last."""
        return [] if self._rounded is None else self._rounded.differing(self._policy)

    def room(self, params: SamplingParams) -> int:
        """The longest prompt whose sequence, answered, fits the model and a micro-batch."""
        limits = (self._model.architecture.max_positions, self._prefill_tokens)
        return min(limits) - params.max_response_tokens

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None = None
    ) -> list[list[Rollout]]:
        """For each request its samples, in order. Collective over all ranks.

        ended: is told of each sample that a stop ends, at once, and of all samples of each batch but the last, without
            their routes.
        Raises RolloutError, on every rank, for an empty prompt, a prompt longer than the model or the prefill budget
        takes, and logits that are not finite; Interrupted at a signal.
        """
        raise_everywhere(misfit(requests, params, self._model.architecture.max_positions, self._prefill_tokens))
        self._fault = None
        model, self._recorder = self._model, None
        if params.report_routes:
            self._recorder = RouteRecorder(model.chunks, model.architecture, model.groups)
        generated = self._generate(requests, params, ended)
        raise_everywhere(self._fault)
        return generated

    def _generate(
        self, requests: Sequence[Request], params: SamplingParams, ended: Ended | None
    ) -> list[list[Rollout]]:
        done: dict[tuple[int, int], Rollout] = {}
        batches = in_batches(requests, self._max_batch)
        for number in range(most(len(batches), self._ranks)):
            batch = batches[number] if number < len(batches) else []
            tell = None if ended is None else partial(self._tell, ended)
            samples, routes = self._run_batch(batch, params, tell)
            self._stop.check()
            if tell is not None and number < len(batches) - 1:
                tell(samples, samples.unstopped())
            for one, rollout in zip(samples.all, samples.rollouts(self.version, routes), strict=True):
                done[one.index, one.sample_index] = rollout
        return [[done[i, k] for k in range(request.samples)] for i, request in enumerate(requests)]

    def _tell(self, ended: Ended, samples: Samples, numbers: Sequence[int]) -> None:
        for number in numbers:
            ended(samples.all[number].index, samples.rollout(number, self.version))

    def _run_batch(
        self, batch: list[tuple[int, Request, range]], params: SamplingParams, tell: Tell | None
    ) -> tuple[Samples, list[torch.Tensor] | None]:
        longest = most(max((len(r.prompt_ids) for _, r, _ in batch), default=1), self._ranks)
        capacity = params.max_response_tokens + longest
        cache = KVCache(len(batch) + 1, capacity + -capacity % POSITIONS_MULTIPLE)
        record = self._start_recording()
        first_logits = self._prefill([request for _, request, _ in batch], cache, record)
        prompt_routes = cut_routes(record, [len(request.prompt_ids) for _, request, _ in batch])
        samples = Samples(
            [Sample(i, source, request, k) for source, (i, request, ks) in enumerate(batch) for k in ks],
            params,
            self._device,
        )
        owner = self._ints([one.source for one in samples.all])
        cache.select(torch.cat([owner, self._ints([len(batch)])]))
        self._continue(samples, None if first_logits is None else first_logits[owner], cache, params, tell)
        return samples, self._gather_routes(samples, prompt_routes)

    def _continue(
        self,
        samples: Samples,
        logits: torch.Tensor | None,
        cache: KVCache,
        params: SamplingParams,
        tell: Tell | None,
    ) -> None:
        """Samples from the logits [N, V] behind the prompts, until all of these samples have ended. Collective.

        All ranks meet now and then, so that none waits longer than a collective may for one with longer samples.
        """
        decoder: Decoder | None = None
        keys = [f"{params.seed}/{one.request.uid}/{one.sample_index}" for one in samples.all]
        uniforms_RS = uniforms(keys, params.max_response_tokens).T.contiguous().to(self._device)
        together = dist.group.WORLD if self._in_unison else self._model.groups.model
        assert together is not None
        fullest = self._fullest(samples)
        for step in range(params.max_response_tokens):
            if step and step % MEETING_TOKENS == 0 and not self._in_unison:
                largest(1)
            if step and step % CHECK_TOKENS == 0 and self._stop.asked(together):
                break
            if samples.active:
                self._append(samples, logits, uniforms_RS[step][samples.numbers_N], params)
            last = step + 1 == params.max_response_tokens
            if last or (step + 1) % self._interval == 0:
                stopped = samples.retire(cache)
                if tell is not None:
                    tell(samples, stopped)
                fullest = 0 if last else self._fullest(samples)
            if not fullest:
                break
            decoder = decoder or self._decoder(cache)
            output = decoder.step(StepInput(samples.newest_N, samples.positions_N, samples.used, fullest))
            logits = output.logits_NV
            if output.routes_NLK is not None and samples.active:
                samples.keep_routes(output.routes_NLK)
        while not self._in_unison and largest(0):
            pass
        if samples.broken:
            self._fault = RolloutError(
                "the model's logits are not finite, so nothing can be sampled; go on from a checkpoint before the "
                "weights broke, with a lower optimizer.lr, or check the weights in model.hf"
            )

    def _fullest(self, samples: Samples) -> int:
        """Unfinished samples of the rank with the most, of those that step in unison with this one."""
        return most(samples.active, self._ranks) if self._in_unison else samples.active

    def _decoder(self, cache: KVCache) -> Decoder:
        buckets, graphs = self._device.type == "cuda", make_graphs(self._model, self._cuda_graph)
        return Decoder(self._forward(cache), cache, self._device, buckets, graphs)

    def _forward(self, cache: KVCache) -> Callable[[StepInput], StepOutput]:
        obstacle = lean_obstacle(self._model)
        if obstacle is None:
            round_inputs = None if self._rounded is None else self._rounded.round_inputs
            return LeanForward(self._model, cache, records=self._recorder is not None, round_inputs=round_inputs)
        if self._model.groups.rank == 0:
            warn_of_whole_forward(obstacle)
        return partial(self._whole_forward, cache)

    def _whole_forward(self, cache: KVCache, step: StepInput) -> StepOutput:
        """A decode step as every other pass runs."""
        count = len(step.ids_N)
        rows = torch.arange(count + 1, device=self._device)
        item = ModelInput(
            step.ids_N,
            step.positions_N,
            rows,
            cache=cache,
            rows_T=rows[:-1],
            used=step.used,
            rows_in_order=True,
        )
        record = self._start_recording()
        logits = self._logits([item], [rows[:-1]], record)
        routes = None if record is None else record.recorded(0).routes_TLK
        return StepOutput(None if logits is None else logits[0], routes)

    def _start_recording(self) -> RoutePass | None:
        return None if self._recorder is None else self._recorder.start()

    def _gather_routes(self, samples: Samples, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Each sample's routes of all layers [tokens - 1, A, K] on the CPU; prompts: of this stage, by request."""
        if self._recorder is None or not samples.all:
            return None
        fed = samples.fed_routes() or [prompts[0][:0]] * len(samples.all)
        pieces = [torch.cat([prompts[one.source], routes]) for one, routes in zip(samples.all, fed, strict=True)]
        routes = gather_layers(torch.cat(pieces), self._recorder.layers).cpu()
        return [whole.clone() for whole in routes.split([len(piece) for piece in pieces])]

    def _prefill(self, requests: list[Request], cache: KVCache, record: RoutePass | None) -> torch.Tensor | None:
        """Fills each request's row; logits [N, V] behind each prompt on the last stage."""
        packs = in_packs(requests, self._prefill_tokens)
        packs += [[] for _ in range(most(len(packs), self._ranks) - len(packs))]
        inputs = [self._prefill_input([(row, requests[row].prompt_ids) for row in pack], cache) for pack in packs]
        logits = self._logits(inputs, [item.cu_seqlens[1:] - 1 for item in inputs], record)
        return None if logits is None else torch.cat(logits)

    def _prefill_input(self, prompts: list[tuple[int, tuple[int, ...]]], cache: KVCache) -> ModelInput:
        lengths = self._ints([len(ids) for _, ids in prompts])
        return ModelInput(
            self._ints([token for _, ids in prompts for token in ids]),
            self._ints([position for _, ids in prompts for position in range(len(ids))]),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            cache=cache,
            rows_T=torch.repeat_interleave(self._ints([row for row, _ in prompts]), lengths),
        )

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _logits(
        self, inputs: list[ModelInput], positions: list[torch.Tensor], record: RoutePass | None
    ) -> list[torch.Tensor] | None:
        """Every token's logits at the given positions of each pack, on every rank of the last stage."""

        def head(index: int, stage: LastStage) -> tuple[None, torch.Tensor]:
            logits_NV = gather_vocab(stage.logits(positions[index]), self._model.groups.tensor)
            return None, logits_NV[:, : self._model.vocab]

        scope = no_recording if record is None else record.scope
        kept = run(self._model, inputs, head, backward=False, record=scope)
        return kept if self._model.groups.is_last_stage else None

    def _append(
        self, samples: Samples, logits: torch.Tensor | None, uniforms_N: torch.Tensor, params: SamplingParams
    ) -> None:
        """Samples one token for each active sample on the last stage, and tells the other stages."""
        picked = torch.empty(2, samples.active, dtype=torch.float64, device=self._device)
        if logits is not None:
            tokens_N, log_probs_N = sample(logits, uniforms_N, params.temperature, params.top_p, params.top_k)
            picked = torch.stack([tokens_N.double(), log_probs_N.double()])
        groups = self._model.groups
        if groups.pipeline.size() > 1:
            dist.broadcast(picked, groups.last_stage_rank, group=groups.pipeline)
        samples.append(picked[0].long(), picked[1].float())
