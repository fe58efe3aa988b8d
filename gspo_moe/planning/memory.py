"""What a rank needs of its device's memory, from the config alone. Torch-free.

With h hidden size, H query heads, G key/value heads, d head size, E experts, K experts a token, f expert width, V rows
of the vocabulary, L layers; t tensor, p pipeline, c context, e expert and x expert-tensor parallel sizes; b bytes of
`model.dtype`; T = micro_batch_tokens / c tokens of a micro-batch on a rank. Every figure is of one rank.

Weights: a layer has 2 h (H + G) d / t (attention), h E (router), 2 h + 2 d (norms) and E / e * 3 h f / x (experts); the
first stage has the embedding V h / t, the last the output layer V h / t and a norm. b bytes each, and as much again for
the frozen reference of a KL penalty. The copy of `rollout.numerics` has 2 bytes each.

Gradients: 4 bytes a weight, in megatron-core's buffers, which reduce in fp32.

Optimizer: Adam's two moments, 8 bytes a weight, and 4 for the fp32 weights beside bf16 ones. With
`parallel.distributed_optimizer` (ZeRO stage 1, arXiv 1910.02054) divided by data * c for dense weights and by the
expert-data size for experts.

Activations: what the backward pass of a layer keeps of a token, counted as arXiv 2205.05198 counts, for the layers of
`model.backend: local`. With sequence parallelism the first and last line are divided by t:

    4 h b                   inputs of the two norms, and their results, which products take
    (6 H + 5 G) d b / t     queries, keys and values as they come, normed, and by sequence; attention's result likewise
    K (h x + 3 f) b         tokens sent to experts; gate and up, and their product

for as many micro-batches as a stage has under way (p - s of 1F1B's stage s, counted from 0), and h b for the last norm.
`recompute: full` keeps h b of each layer and the whole of one. Flash attention of a GPU, which needs no copies by
sequence, keeps less. Experts get equal numbers of tokens here; a router out of balance needs more.

Log-probs: `log_prob_memory_mib` where fused, else logits in b bytes, and in fp32 with their gradient.

Generation: keys and values, 2 G / t d b a position in each of the stage's layers, for `max_batch` answers (or all of a
step on this rank, where they are fewer) of prompt and `max_response_tokens` (the larger of rollout's and
evaluation's), beside the prompts' own rows; logits in fp32 of each answer's last token, twice. It comes at another
time than the backward pass: the larger of both counts.

Left out: the CUDA context and NCCL's buffers (1 to 3 GiB), fragmentation, CUDA graphs, on a CPU in fp32 the copy of
the weights that a batch is decoded with, and what a step keeps of its routers: routes, scores, and for `routing.replay:
predict` their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_moe.config.architecture import Architecture
from gspo_moe.config.layout import Layout
from gspo_moe.config.schema import Config

FP32 = 4
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
POSITIONS_MULTIPLE = 16  # of a KV cache


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, of the pipeline stage that needs most; `parameters` is how many its shard has."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    rollout_copy: int
    activations: int
    log_probs: int
    kv_cache: int
    logits: int

    @property
    def persistent(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.rollout_copy

    @property
    def peak(self) -> int:
        return self.persistent + max(self.activations + self.log_probs, self.kv_cache + self.logits)


def estimate(config: Config, architecture: Architecture, layout: Layout, prompt_tokens: int) -> Memory:
    """Of a run of `config` with prompts of up to `prompt_tokens` tokens."""
    stages = (_stage(config, architecture, layout, stage, prompt_tokens) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.peak)


def shard_parameters(architecture: Architecture, layout: Layout, stage: int) -> tuple[int, int]:
    """Dense and expert parameters of a rank of pipeline stage `stage`, from 0."""
    hidden, tensor = architecture.hidden_size, layout.tensor
    heads, groups, size = architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim
    attention = hidden * (2 * heads + 2 * groups) * size // tensor
    dense = attention + hidden * architecture.num_experts + 2 * hidden + 2 * size
    expert = 3 * hidden * architecture.moe_intermediate_size // layout.expert_tensor
    layers = architecture.num_hidden_layers // layout.pipeline
    rows, last = -(-architecture.vocab_size // tensor), stage == layout.pipeline - 1
    shared = architecture.tie_word_embeddings and layout.pipeline == 1
    ends = (stage == 0) * rows * hidden + last * (hidden + (0 if shared else rows * hidden))
    return layers * dense + ends, layers * (architecture.num_experts // layout.expert) * expert


def activation_bytes(architecture: Architecture, layout: Layout, dtype: str) -> float:
    """That the backward pass keeps of one token in one layer."""
    hidden, width = architecture.hidden_size, DTYPE_BYTES[dtype]
    heads, groups, size = architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim
    attention = (6 * heads + 5 * groups) * size
    routed = hidden * layout.expert_tensor + 3 * architecture.moe_intermediate_size
    experts = architecture.num_experts_per_tok * routed
    return width * ((4 * hidden + experts) / _sequence_split(layout) + attention / layout.tensor)


def _sequence_split(layout: Layout) -> int:
    return layout.tensor if layout.sequence_parallel else 1


def kv_cache_bytes(config: Config, architecture: Architecture, layout: Layout, prompt_tokens: int) -> int:
    """Of a rank's largest batch of answers, with the rows of their prompts."""
    answers, rollout = _answers(config, layout), config.rollout
    prompts = -(-answers // rollout.samples_per_prompt)
    splits = ("train", "eval") if config.evaluation.prompts else ("train",)
    capacity = prompt_tokens + max(config.answer_limit(split)[0] for split in splits)
    capacity += -capacity % POSITIONS_MULTIPLE
    groups = architecture.num_key_value_heads // layout.tensor
    dtype = config.model.dtype if config.rollout.numerics == "trainer" else "bf16"
    position = 2 * groups * architecture.head_dim * DTYPE_BYTES[dtype]
    layers = architecture.num_hidden_layers // layout.pipeline
    return (answers + 1 + prompts + 1) * capacity * position * layers


def _answers(config: Config, layout: Layout) -> int:
    rollout = config.rollout
    mine = rollout.prompts_per_step * rollout.samples_per_prompt // (layout.data * layout.context)
    return max(1, min(rollout.max_batch, mine))


def _stage(config: Config, architecture: Architecture, layout: Layout, stage: int, prompt_tokens: int) -> Memory:
    dense, expert = shard_parameters(architecture, layout, stage)
    width = DTYPE_BYTES[config.model.dtype]
    states = 2 * FP32 + (FP32 if config.model.dtype == "bf16" else 0)
    share = (layout.data * layout.context, layout.expert_data) if config.parallel.distributed_optimizer else (1, 1)
    rl, last = config.stage == "rl", stage == layout.pipeline - 1
    samples = rl and config.rollout.bank is None
    return Memory(
        parameters=dense + expert,
        weights=(dense + expert) * width,
        gradients=(dense + expert) * FP32,
        optimizer=dense * states // share[0] + expert * states // share[1],
        reference=(dense + expert) * width if rl and config.algorithm.kl.coeff else 0,
        rollout_copy=0 if config.rollout.numerics == "trainer" else (dense + expert) * DTYPE_BYTES["bf16"],
        activations=_activations(config, architecture, layout, stage),
        log_probs=_log_probs(config, architecture, layout) if last else 0,
        kv_cache=kv_cache_bytes(config, architecture, layout, prompt_tokens) if samples else 0,
        logits=2 * _answers(config, layout) * architecture.vocab_size * FP32 if samples and last else 0,
    )


def _activations(config: Config, architecture: Architecture, layout: Layout, stage: int) -> int:
    tokens = config.schedule.micro_batch_tokens / layout.context
    layers = architecture.num_hidden_layers // layout.pipeline
    whole = activation_bytes(architecture, layout, config.model.dtype)
    under_way: float = layout.pipeline - stage
    if layout.virtual_pipeline:  # arXiv 2205.05198, 4.2.3
        under_way *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual_pipeline)
    split, hidden = _sequence_split(layout), architecture.hidden_size
    width = DTYPE_BYTES[config.model.dtype]
    norm = width * hidden / split if stage == layout.pipeline - 1 else 0.0
    if config.parallel.recompute != "full":
        return round(tokens * (layers * whole * under_way + norm))
    kept = hidden * width / split
    return round(tokens * (layers * kept * under_way + whole + norm))


def _log_probs(config: Config, architecture: Architecture, layout: Layout) -> int:
    tokens, rows = config.schedule.micro_batch_tokens // layout.context, architecture.vocab_size // layout.tensor
    whole = tokens * rows * (DTYPE_BYTES[config.model.dtype] + 2 * FP32)
    return min(whole, config.model.log_prob_memory_mib << 20) if config.model.fused_log_probs else whole
