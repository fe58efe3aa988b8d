"""The one list of metric names, with unit and meaning; every name that is written stands here.

`docs/metrics.md` is this list as a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MINI_BATCH = "mini_batch_{k}"
LAYER = "layer_{l}"
LAG = "lag_{n}"
SUFFIX = re.compile(r"^(?P<base>.+)/(?:(?P<mini_batch>mini_batch_[1-9]\d*)|(?P<layer>layer_\d{2,})|(?P<lag>lag_\d+))$")


@dataclass(frozen=True)
class MetricDoc:
    """One metric: its name, unit and meaning, and the suffixes under which it is written as well."""

    name: str
    unit: str
    meaning: str
    suffixes: tuple[str, ...] = ()


FIGURES = {"mean": "mean", "std": "standard deviation", "min": "smallest value", "max": "largest value"}
PHASES = {
    "rollout": "generation",
    "waiting": "waiting for rollouts of servers; on-policy, all of generation",
    "reward": "rewarding answers",
    "old_log_probs": "the old policy's log-probs",
    "reference": "the reference's log-probs",
    "training": "all mini-batches: forward, backward, optimizer, and what is measured between them",
    "routing": "probe and attribution, part of training",
    "replicas": "comparing weights over ranks, in the steps that `parallel.check_interval` says",
    "evaluation": "held-out evaluation",
    "checkpoint": "saving, as far as training waits for it",
    "step": "the whole step",
}
PAIRS = {
    "staleness": "each mini-batch's policy against the old policy",
    "update": "after one optimizer step against before, on the probe set",
    "engine": "trainer against rollout engine at equal weights",
}
PAIR_FIGURES = {
    "slot_change": ("fraction", "expert slots that differ"),
    "flip_rate": ("fraction", "tokens and layers whose expert set differs"),
    "any_layer_flip": ("fraction", "tokens whose set differs in any layer"),
    "flipped_layers_per_token": ("layers", "layers whose set differs, a token"),
    "response_set_change": ("fraction", "experts of a whole response that are not picked again, a sequence and layer"),
    "router_margin": ("probability", "p_(K) - p_(K+1) of the old router's softmax, mean"),
    "router_shift": ("ratio", "gamma of arXiv 2510.23027: exp of minus the old experts' log-probs' mean change"),
}
MARGINS = ("below 1e-4", "1e-4 to 1e-3", "1e-3 to 1e-2", "1e-2 to 1e-1", "1e-1 and more")
NEEDS_SCORES = ("router_margin", "router_shift", "flip_rate_by_margin")
ATTRIBUTION = {
    "phi_token": "share of the token log-ratio's variance that changed routes explain",
    "phi_sequence": "share of the sequence log-ratio's variance that changed routes explain",
    "washout": "W: about 1 where a sequence's mean washes routing noise out, more where it survives",
    "design_effect": "1 where routing noise is independent between tokens, whatever the lengths, more where shared",
}
REPLAY = {
    "coverage": ("fraction", "tokens and MoE layers of the training forward that ran with replayed routes"),
    "consumed": ("", "times that each of those took its routes: 1, or the run ends"),
    "forced": ("fraction", "replayed expert slots for which the router would have picked another expert"),
    "aligned": ("fraction", "slots of mini-batch 1 that the router would have picked itself, prompts included"),
    "aligned_shifted": ("fraction", "the same against the row of the token before or behind, whichever is more"),
    "aligned_by_chance": ("fraction", "the same of two tokens drawn at random, by the experts' load"),
    "router_grad_norm": ("", "the routers' part of the gradient norm before clipping, mean over updates"),
}
INTERVAL = {"": "", "_low": ", 95 % bootstrap interval from", "_high": ", 95 % bootstrap interval to"}


def _pair(pair: str, words: str) -> Iterator[MetricDoc]:
    """Every figure of one pair of policies; mini-batches and layers are written for staleness, in the log."""
    free = pair == "staleness"
    for name, (unit, meaning) in PAIR_FIGURES.items():
        if pair == "engine" and name in NEEDS_SCORES:
            continue
        by_layer = (LAYER,) if name in ("slot_change", "flip_rate") else ()
        suffixes = (MINI_BATCH, *by_layer) if free else ()
        by_lag = (LAG,) if name in ("slot_change", "flip_rate") and pair != "update" else ()
        yield MetricDoc(f"routing/{pair}/{name}", unit, f"{meaning}: {words}", (*suffixes, *by_lag))
    if pair != "engine":
        for number, margin in enumerate(MARGINS):
            meaning = f"flip rate where the old margin is {margin}: {words}"
            yield MetricDoc(f"routing/{pair}/flip_rate_by_margin/bin_{number}", "fraction", meaning)
    if not free:
        for suffix, bound in {"_low": "from", "_high": "to"}.items():
            meaning = f"slot change: {words}, 95 % interval over sequences {bound}"
            yield MetricDoc(f"routing/{pair}/slot_change{suffix}", "fraction", meaning)
    yield MetricDoc(f"routing/{pair}/noise_floor/slot_change", "fraction", f"the same at equal weights: {words}")


METRICS = (
    MetricDoc("reward/mean", "reward", "mean over the step's rollouts"),
    MetricDoc("reward/std", "reward", "standard deviation over the step's rollouts"),
    MetricDoc("reward/parts/{part}", "", "mean of a named part that the task's rubric gave"),
    MetricDoc("reward/failures", "rollouts", "rewards that raised and got `task.reward.failure_reward`"),
    MetricDoc("reward/timeouts", "rollouts", "rewards that ran past `task.reward.timeout_seconds`, or `batch_seconds`"),
    MetricDoc("reward/failure_rate", "fraction", "rewards of either kind; shown beside the progress where it is not 0"),
    MetricDoc("reward/overlong_penalty", "reward", "mean of what `algorithm.overlong_buffer` takes off"),
    MetricDoc("groups/count", "groups", "prompt groups that the step learns from"),
    MetricDoc("groups/drawn", "groups", "prompt groups sampled; reward and response figures are over all of them"),
    MetricDoc("groups/degenerate", "groups", "sampled groups whose rewards are all equal: nothing to learn"),
    MetricDoc("response/length_mean", "tokens", "mean response length, stop token included"),
    MetricDoc("response/length_max", "tokens", "longest response"),
    MetricDoc("response/truncated", "fraction", "responses cut off by a limit of `rollout` or the model"),
    MetricDoc("eval/accuracy", "fraction", "held-out answers with full reward"),
    MetricDoc("eval/pass_at/{k}", "fraction", "held-out prompts of which one of k answers is right, unbiased estimate"),
    MetricDoc("eval/reward", "reward", "mean reward of held-out answers"),
    MetricDoc("eval/response_length", "tokens", "mean length of held-out answers"),
    MetricDoc("eval/truncated", "fraction", "held-out answers cut off by the length limit"),
    MetricDoc("loss/policy", "", "policy loss, mean over the step's mini-batches"),
    MetricDoc("loss/kl", "", "coefficient times the KL to the reference, averaged as the policy loss"),
    MetricDoc("clip_fraction/sequence", "fraction", "sequences whose gradient or weight the clip cuts"),
    MetricDoc("clip_fraction/token", "fraction", "response tokens whose gradient or weight the clip cuts"),
    *(
        MetricDoc(f"ratio/{level}_{figure}", "ratio", f"{words} of the {level} ratio, policy over old policy")
        for level in ("token", "sequence")
        for figure, words in FIGURES.items()
    ),
    MetricDoc("router_shift/mean", "ratio", "gamma of arXiv 2510.23027 before any floor, mean over response tokens"),
    MetricDoc("router_shift/floored", "fraction", "response tokens whose gamma the loss's floor of 0.8 holds up"),
    MetricDoc("value/loss", "", "half the squared error of the values, clipped, mean over response tokens"),
    MetricDoc("value/clip_fraction", "fraction", "response tokens whose value's gradient `value_clip` removes"),
    MetricDoc("value/explained_variance", "fraction", "share of the returns' variance that the old values explain"),
    MetricDoc("policy/entropy", "nats", "entropy of the policy's next token, mean over response tokens"),
    MetricDoc("algorithm/{figure}", "", "the algorithm's own figures, mean over response tokens"),
    MetricDoc("kl/old_k3", "nats", "k3 estimate of KL(old ‖ policy), a token"),
    MetricDoc("kl/reference", "nats", "estimate of KL(policy ‖ reference), a token"),
    MetricDoc("off_policy_mask/dropped", "fraction", "response tokens that `algorithm.off_policy_mask` drops"),
    MetricDoc("mismatch/weight_mean", "", "mean weight of a token or sequence, by `algorithm.mismatch`"),
    MetricDoc("mismatch/weight_cut", "fraction", "tokens or sequences whose weight is truncated or masked"),
    MetricDoc("mismatch/k3", "nats", "k3 estimate of KL(rollout ‖ trainer), a token", (LAG,)),
    MetricDoc(
        "mismatch/token_ratio_above_2", "fraction", "tokens with max(p/q, q/p) > 2, trainer and rollout engine", (LAG,)
    ),
    MetricDoc("mismatch/log_ratio_std", "nats", "standard deviation of trainer over rollout, a token; by lag", (LAG,)),
    *(
        MetricDoc(f"mismatch/sequence_ratio_{figure}", "ratio", f"{words} of trainer over rollout engine, a sequence")
        for figure, words in FIGURES.items()
    ),
    *(doc for pair, words in PAIRS.items() for doc in _pair(pair, words)),
    *(
        MetricDoc(f"routing/attribution/{name}{suffix}", "", words + bound)
        for name, words in ATTRIBUTION.items()
        for suffix, bound in INTERVAL.items()
    ),
    MetricDoc("routing/attribution/sequences", "sequences", "sample that the split was measured on"),
    MetricDoc(
        "routing/load/max_violation",
        "fraction",
        "how far the busiest expert's tokens exceed the mean, prompt and response of the training forward",
        (LAYER,),
    ),
    MetricDoc("routing/load/cv", "fraction", "standard deviation over mean of the experts' tokens", (LAYER,)),
    MetricDoc("routing/load/entropy", "nats", "entropy of the experts' shares; log E when all are equal", (LAYER,)),
    *(
        MetricDoc(f"routing/load/rollout/{name}", unit, f"{name} of the load in the rollout engine")
        for name, unit in {"max_violation": "fraction", "cv": "fraction", "entropy": "nats"}.items()
    ),
    *(MetricDoc(f"routing/replay/{name}", unit, words) for name, (unit, words) in REPLAY.items()),
    MetricDoc(
        "routing/predictor/kl",
        "nats",
        "KL(router ‖ what predictors foretell by then), a token and layer, from mini-batch 2",
    ),
    MetricDoc("routing/predictor/kl_unchanged", "nats", "the same of what the router was in the old policy's pass"),
    MetricDoc("routing/predictor/changed", "fraction", "expert slots foretold otherwise than the router had them then"),
    MetricDoc("lag/mean", "steps", "steps taken since a token was sampled, mean over response tokens"),
    MetricDoc("lag/max", "steps", "the same, at most"),
    MetricDoc("lag/tokens", "fraction", "response tokens that are older than the step's policy", (LAG,)),
    MetricDoc("queue/ready", "groups", "answered, and left for later steps when the step has taken its own"),
    MetricDoc("queue/running", "groups", "asked for and not answered when the step has taken its own"),
    MetricDoc("queue/dropped", "groups", "given up as older than `rollout.max_staleness`, and asked for again"),
    MetricDoc("queue/dropped_tokens", "tokens", "response tokens of those"),
    MetricDoc("queue/idle_seconds", "s", "time in which the servers had nothing to do, mean over the ranks that ask"),
    MetricDoc("optimizer/grad_norm", "", "global gradient norm before clipping, mean over updates"),
    MetricDoc("optimizer/learning_rate", "", "learning rate of the step's last update"),
    MetricDoc("optimizer/skipped_updates", "updates", "updates left out because the loss or a gradient was not finite"),
    MetricDoc("guard/bad_steps", "steps", "in a row with a figure out of the bounds of `guard`, this one included"),
    MetricDoc("guard/roll_backs", "roll-backs", "of the run so far, by `guard`"),
    MetricDoc("checkpoint/failures", "saves", "that failed since the run was last started; written where one did"),
    MetricDoc("policy_version", "updates", "optimizer steps the weights have taken"),
    MetricDoc("sft/loss", "nats", "cross-entropy a response token"),
    MetricDoc("sft/token_accuracy", "fraction", "response tokens that are the model's first choice"),
    MetricDoc("rollout/tokens_per_second", "tokens/s", "response tokens a second of generation, all ranks"),
    MetricDoc("rollout/tokens", "tokens", "response tokens generated, all ranks"),
    MetricDoc("rollout/servers/up", "servers", "rollout servers in use at the step's end, as the rank that has fewest"),
    MetricDoc("rollout/servers/taken_out", "servers", "found dead or with old weights, by all ranks that ask"),
    MetricDoc("rollout/servers/retries", "answers", "asked for once more, as a server failed or answered badly"),
    MetricDoc("rollout/servers/tokens_per_second", "tokens/s", "from servers while any answer was under way"),
    MetricDoc("rollout/servers/latency_median_seconds", "s", "of an answer, from asking to having it, median"),
    MetricDoc("rollout/servers/latency_tail_seconds", "s", "the same, of the slowest 1 %"),
    MetricDoc("rollout/servers/utilisation", "fraction", "answers under way, mean over the time of any, over the most"),
    MetricDoc("sync/seconds", "s", "giving rollout servers new weights, the probe of them included"),
    MetricDoc("sync/bytes", "bytes", "weights given to each rollout server"),
    MetricDoc("sync/probe_difference", "nats", "log-probs of a probe against the trainer's, mean of the worst server"),
    *(MetricDoc(f"timing/{phase}_seconds", "s", f"wall time of {words}") for phase, words in PHASES.items()),
    MetricDoc("throughput/tokens_per_second", "tokens/s", "tokens trained on a second of the whole step, all ranks"),
    MetricDoc("throughput/tokens", "tokens", "prompt and response tokens trained on, all ranks"),
    MetricDoc("memory/peak_rss_gib", "GiB", "peak resident memory of the main process"),
    MetricDoc("memory/peak_device_gib", "GiB", "peak memory allocated on the main process's device"),
)
CATALOG = {doc.name: doc for doc in METRICS}

PAGE_HEAD = """# Metrics

Every name in `metrics.jsonl`, TensorBoard and Weights & Biases. Figures are over all data-parallel ranks. A value that
is not finite is `null` in `metrics.jsonl`. `.../mini_batch_{k}` is the step's k-th mini-batch, from 1; `.../layer_{l}`
is the l-th MoE layer, from 00, in two digits; `.../lag_{n}` are the tokens of lag n ([asynchrony.md](asynchrony.md)).
"""


# Of names that tasks, algorithms and configs give.
OPEN = ("algorithm/{figure}", "reward/parts/{part}", "eval/pass_at/{k}")


def describe(name: str) -> MetricDoc:
    """The entry of a metric, its name perhaps with a suffix; raises KeyError for a name that is not in the catalog."""
    if name in CATALOG:
        return CATALOG[name]
    for family in OPEN:
        if name.startswith(family.partition("{")[0]):
            return CATALOG[family]
    match = SUFFIX.match(name)
    doc = CATALOG.get(match["base"]) if match else None
    if match is None or doc is None or _suffix(match) not in doc.suffixes:
        raise KeyError(f"{name} is not in the catalog of metrics")
    return doc


def _suffix(match: re.Match[str]) -> str:
    return MINI_BATCH if match["mini_batch"] else LAYER if match["layer"] else LAG


def markdown() -> str:
    """The catalog as the page docs/metrics.md."""
    lines = [PAGE_HEAD, "| metric | unit | meaning | also as |", "|---|---|---|---|"]
    for doc in CATALOG.values():
        also = ", ".join(f"`.../{suffix}`" for suffix in doc.suffixes)
        lines.append(f"| `{doc.name}` | {doc.unit} | {doc.meaning} | {also} |")
    return "\n".join(lines) + "\n"
