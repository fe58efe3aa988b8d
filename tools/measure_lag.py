"""What age does to tokens: `python tools/measure_lag.py CONFIG.yaml [section.key=value ...] --max-staleness N`.

Trains on answers that go on while weights change, in one process: servers of the embedded engine's, which sample
`--tokens` tokens of each answer a step. So an answer has tokens of several versions, as partial rollouts of a server
have, and at equal weights engine and trainer agree: what the figures by lag say is what the steps have moved. Printed
by lag, means over steps: share of tokens, k3 and log-ratio of trainer over rollout policy, slots that changed since the
token was sampled, and by the step's own mini-batches; then what the probe behind a sync would read of servers that had
kept the weights of the step before, and the held-out accuracy. `--out` keeps them as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

COLUMNS = {
    "tokens": "lag/tokens/lag_{}",
    "k3": "mismatch/k3/lag_{}",
    "log-ratio std": "mismatch/log_ratio_std/lag_{}",
    "ratio > 2": "mismatch/token_ratio_above_2/lag_{}",
    "slots (engine)": "routing/engine/slot_change/lag_{}",
    "slots (staleness)": "routing/staleness/slot_change/lag_{}",
}


class EmbeddedServers:
    """`Servers` of one engine, which samples so many tokens of each answer between two changes of its weights.

    prompts: of a step, which it goes on with to their end where somebody waits.
    """

    def __init__(self, engine: Any, tokens: int, prompts: int) -> None:
        self._engine, self._tokens, self._prompts = engine, tokens, prompts
        self._asked: list[tuple[Any, Future[Any]]] = []
        self._sampled: list[tuple[Future[Any], Any]] = []

    def submit(self, ask: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._asked.append((ask, future))
        return future

    def finish(self, condition: threading.Condition, seconds: float) -> None:
        """Answers the oldest prompts' Asks, for which somebody waits, as far as they go."""
        oldest = sorted({ask.uid for ask, _ in self._asked}, key=lambda uid: int(uid.split("/")[1]))[: self._prompts]
        asked = [each for each in self._asked if each[0].uid in oldest]
        self._asked = [each for each in self._asked if each[0].uid not in oldest]
        for (ask, future), one in zip(asked, self._answers([ask for ask, _ in asked]), strict=True):
            future.set_result(self._answer(ask, one, ask.max_tokens))

    def advance(self) -> None:
        """While the trainer learns: everything under way gets its tokens of the weights as they are."""
        asked, self._asked = self._asked, []
        found = zip(asked, self._answers([ask for ask, _ in asked]), strict=True)
        self._sampled = [(future, self._answer(ask, one, self._tokens)) for (ask, future), one in found]

    def publish(self) -> None:
        """Weights have changed: what was sampled is broken off, where it has not ended."""
        sampled, self._sampled = self._sampled, []
        for future, answer in sampled:
            future.set_result(answer)

    def _answers(self, asks: list[Any]) -> list[Any]:
        from gspo_moe.rollout.engine import Request

        alike: dict[Any, list[int]] = defaultdict(list)
        found: dict[int, Any] = {}
        for number, ask in enumerate(asks):
            alike[ask.params, ask.max_tokens].append(number)
        for (params, tokens), numbers in alike.items():
            requests = [Request(f"{asks[n].uid}/{asks[n].sample_index}", asks[n].token_ids, 1) for n in numbers]
            sampled = self._engine.generate(requests, replace(params, max_response_tokens=tokens))
            found |= {number: one for number, (one,) in zip(numbers, sampled, strict=True)}
        return [found[number] for number in range(len(asks))]

    def _answer(self, ask: Any, one: Any, tokens: int) -> Any:
        from gspo_moe.rollout.servers.records import Answer

        asked, whole = len(ask.token_ids), tokens >= len(one.log_probs)
        return Answer(
            one.token_ids[asked : asked + tokens],
            one.log_probs[:tokens],
            one.finish if whole else "abort",
            self._engine.version,
            None if one.routes is None else one.routes.numpy()[: asked + min(tokens, len(one.log_probs)) - 1],
        )

    def close(self) -> None:
        pass


def probed(session: Any, version: int) -> Any:
    """The probe's answer of the weights as they are."""
    from gspo_moe.rollout.engine import Request
    from gspo_moe.rollout.servers.probe import probe_ask, probe_ids

    ask = probe_ask(probe_ids(session.plan.tokenizer.vocab_size), version)
    ((answer,),) = session.answerer.engine.generate([Request(ask.uid, ask.token_ids, 1)], ask.params)
    return answer


def apart(model: Any, answer: Any) -> float:
    """As the probe has it, nats a token."""
    from gspo_moe.training.servers import log_probs_of

    scored = log_probs_of(model, answer.token_ids)[-len(answer.log_probs) :]
    return mean(abs(a - b) for a, b in zip(answer.log_probs, scored, strict=True))


def train(path: str, overrides: list[str], max_staleness: int, tokens: int) -> tuple[list[dict[str, float]], float]:
    """Each step's metrics and the held-out accuracy behind the last one."""
    from gspo_moe.config import load_config
    from gspo_moe.evaluation.evaluate import evaluation_metrics
    from gspo_moe.rollout.servers.ahead import ServerSource
    from gspo_moe.training.collect import collect
    from gspo_moe.training.learn import learn
    from gspo_moe.training.preflight import preflight
    from gspo_moe.training.resuming import open_trainer
    from gspo_moe.training.session import open_session

    config = load_config(path, ["routing.engine_routes=true", *overrides])
    session = open_session(preflight(config))
    rollout = session.config.rollout.model_copy(update={"max_staleness": max_staleness})
    session.plan = replace(session.plan, config=config.model_copy(update={"rollout": rollout}))
    if max_staleness:
        fleet: Any = EmbeddedServers(session.answerer.engine, tokens, rollout.prompts_per_step)
        session.servers = SimpleNamespace(fleet=fleet)  # type: ignore[assignment]
        vars(session)["ahead"] = ServerSource(
            fleet,
            session.answerer,
            session.config,
            session.stop_ids,
            session.timers,
            session.stop,
            wait=fleet.finish,
        )
    trainer, steps = open_trainer(session), []
    for number in range(config.schedule.steps):
        old = probed(session, number)
        with session.timers("step"):
            batch = collect(trainer)
            if max_staleness:
                fleet.advance()
            figures = learn(trainer, batch)
            trainer.finish_step(batch.prompts, config.algorithm.mini_batches)
            if max_staleness:
                fleet.publish()
        steps.append({**batch.metrics, **figures.metrics, "probe": apart(session.model, old)})
        print(f"step {number + 1}", file=sys.stderr, flush=True)
    accuracy = evaluation_metrics(session.evaluate("at the end"), ())["eval/accuracy"]
    session.close()
    return steps, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--max-staleness", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4, help="of each answer a step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    steps, accuracy = train(options.config, options.overrides, options.max_staleness, options.tokens)
    found: dict[str, Any] = {
        "accuracy": accuracy,
        "lag": mean(each.get("lag/mean", 0.0) for each in steps),
        "clipped": mean(each["clip_fraction/sequence"] for each in steps),
        "by_lag": [],
    }
    print(" ".join(f"{name:>17}" for name in ("lag", *COLUMNS)))
    for lag in range(options.max_staleness + 1):
        keys = {name: key.format(lag) for name, key in COLUMNS.items()}
        row = {name: mean([each[key] for each in steps if key in each] or [float("nan")]) for name, key in keys.items()}
        found["by_lag"].append(row)
        print(f"{lag:17d} " + " ".join(f"{value:17.3g}" for value in row.values()))
    probe = sorted(each["probe"] for each in steps)
    found["probe"] = {"least": probe[0], "median": median(probe), "most": probe[-1]}
    print("the probe of weights one step old: " + ", ".join(f"{name} {at:.2g}" for name, at in found["probe"].items()))
    print(f"mean lag {found['lag']:.2f}, clipped {found['clipped']:.1%}, held-out accuracy {accuracy:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
