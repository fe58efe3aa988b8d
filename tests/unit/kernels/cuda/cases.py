"""The grid of cases, and random ones.

Why these shapes. A row is a head up to a 16-byte boundary, a body of 16-byte loads (four a thread in flight, then
one), and a tail; a block is 1 to 32 warps. So V takes 1 to 9 (no body, or one vector), both sides of a warp's and a
block's width in elements and in vectors (31 to 257, 1023 to 4099), lengths that end the fourfold loop early, late and
exactly (2048 * 8 and neighbours), the vocabulary of Qwen3 (151936 columns, 151643 of them tokens) and a shard of an
eighth. Every residue of the row's start modulo 16 bytes occurs, with strides that move it from row to row. T is 1, both
sides of the number of blocks, and thousands, so that blocks take several rows. Ranks are 1 to 8, down to ranks without
a column. Sequences are empty, of one token, both sides of a warp and of a block, and thousands long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from tests.unit.kernels.cuda.formats import BYTES, NAMES
from tests.unit.kernels.cuda.interface import FINISH, PARTIAL, Array, Case, Outputs, expect
from tests.unit.kernels.cuda.sequence_cases import Pack, reduce_case
from tests.unit.kernels.cuda.token_cases import (
    Gradients,
    Rows,
    backward_case,
    combine,
    stats_case,
    stats_reference,
    stats_tolerance,
)

SMALL_VOCABS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2053, 4099)
LOOP_VOCABS = (8191, 8192 + 9, 2048 * 8 - 1, 2048 * 8, 2048 * 8 + 1, 2048 * 8 + 24)
QWEN3_TOKENS, QWEN3_COLUMNS = 151643, 151936

Random = np.random.Generator


def grid() -> list[Case]:
    random = np.random.default_rng(0)
    return [
        *vocab_sizes(random),
        *alignments(random),
        *many_tokens(random),
        *qwen3(random),
        *extremes(random),
        *ranks(random),
        *packs(random),
        *context_ranks(random),
    ]


def fuzz(seed: int, count: int) -> Iterator[Case]:
    """`count` random cases of each kernel."""
    random = np.random.default_rng(seed)
    for index in range(count):
        name = f"fuzz {seed}.{index}"
        rows = Rows(
            logits(random, log_uniform(random, 40), log_uniform(random, 3000), random.choice([1.0, 10.0, 1000.0])),
            dtype=str(random.choice(NAMES)),
            padding=int(random.choice([0, 1, 7, 300])),
            gap=int(random.choice([0, 1, 4, 9])),
            shift=int(random.integers(8)),
            start=int(random.integers(200000)),
            temperature=float(random.choice([1.0, 0.6, 1.7])),
        )
        yield from both(name, rows, random, bool(random.integers(2)), int(random.integers(1, 9)))
        yield reduce_case(f"{name} sequences", random_pack(random), num_sms=int(random.integers(1, 9)))


def both(name: str, rows: Rows, random: Random, entropy: bool, num_sms: int = 1) -> list[Case]:
    """Forward and backward of the same rows; a fifth of the tokens has no gradient."""
    targets_T = targets(random, rows)
    some_T = random.standard_normal(rows.tokens) * (random.random(rows.tokens) > 0.2)
    grads = Gradients(
        some_T.astype(np.float32), random.standard_normal(rows.tokens).astype(np.float32) if entropy else None
    )
    return [
        stats_case(f"{name} stats {rows.dtype}", rows, targets_T, entropy, num_sms=num_sms),
        backward_case(f"{name} backward {rows.dtype}", rows, targets_T, grads, num_sms),
    ]


def logits(random: Random, tokens: int, vocab: int, scale: float = 4.0) -> Array:
    return scale * random.standard_normal((tokens, vocab))


def targets(random: Random, rows: Rows) -> Array:
    """Ids of this rank's columns, of the padding, of other ranks, and no ids at all."""
    chosen_T = rows.start + random.integers(0, max(rows.vocab, 1), rows.tokens)
    kind_T = random.random(rows.tokens)
    chosen_T[kind_T > 0.85] = rows.start + rows.vocab
    chosen_T[kind_T > 0.9] = rows.start - 1
    chosen_T[kind_T > 0.95] = -100
    return chosen_T


def log_uniform(random: Random, most: int) -> int:
    return int(np.exp(random.uniform(0, np.log(most + 1))))


def vocab_sizes(random: Random) -> Iterator[Case]:
    for index, vocab in enumerate((*SMALL_VOCABS, *LOOP_VOCABS)):
        for dtype in NAMES:
            rows = Rows(logits(random, 3, vocab), dtype, padding=index % 3)
            yield from both(f"vocab {vocab}", rows, random, entropy=index % 2 == 0)


def alignments(random: Random) -> Iterator[Case]:
    for dtype in NAMES:
        for shift in range(16 // BYTES[dtype]):
            for vocab in (5, 77):
                rows = Rows(logits(random, 4, vocab), dtype, padding=shift % 3, gap=shift % 4, shift=shift)
                yield from both(f"shift {shift} vocab {vocab}", rows, random, entropy=shift % 2 == 1)


def many_tokens(random: Random) -> Iterator[Case]:
    for dtype, tokens, vocab, num_sms in (
        ("bf16", 1, 1000, 16),
        ("fp32", 17, 65, 1),
        ("fp16", 130, 300, 2),
        ("bf16", 40, 4099, 1),
    ):
        yield from both(f"{tokens} tokens", Rows(logits(random, tokens, vocab), dtype), random, True, num_sms)
    for case in both("3001 tokens", Rows(logits(random, 3001, 40), "bf16", gap=1), random, False, 8):
        yield large(case)


def qwen3(random: Random) -> Iterator[Case]:
    """Few tokens for many multiprocessors, so that the backward pass cuts rows over blocks."""
    padding = QWEN3_COLUMNS - QWEN3_TOKENS
    for index, dtype in enumerate(NAMES):
        rows = Rows(logits(random, 2, QWEN3_TOKENS), dtype, padding, temperature=0.9)
        for case in both("Qwen3", rows, random, index % 2 == 0, num_sms=16):
            yield large(case)
    shard = Rows(logits(random, 5, QWEN3_COLUMNS // 8), "bf16", start=QWEN3_COLUMNS // 8)
    for case in both("Qwen3 over 8 ranks", shard, random, True, 16):
        yield large(case)


def extremes(random: Random) -> Iterator[Case]:
    """Rows a naive softmax gets wrong, each in every dtype; forward, and backward where a gradient exists."""
    vocab = 100
    spread = np.linspace(-1e4, 1e4, vocab)
    one = np.full(vocab, -np.inf)
    one[37] = 2.5
    holes = logits(random, 1, vocab)[0]
    holes[random.random(vocab) < 0.5] = -np.inf
    peak = np.full(vocab, -50.0)
    peak[99] = 50.0
    finite = np.stack([np.zeros(vocab), np.full(vocab, 6e4), np.full(vocab, -6e4), spread, one, holes, peak])
    beyond = np.stack([np.full(vocab, -np.inf), holes, holes, holes])
    beyond[1, 3], beyond[2, 98], beyond[3, 5] = np.nan, np.nan, np.inf
    for dtype in NAMES:
        yield from both("extreme", Rows(finite, dtype, padding=3), random, True)
        yield stats_case(f"not finite {dtype}", Rows(beyond, dtype, padding=3), np.array([0, 1, 2, 5]))
        ones_T = np.zeros(4, dtype=np.float32)
        yield backward_case(f"no gradient {dtype}", Rows(beyond, dtype), np.array([0, 1, 2, 5]), Gradients(ones_T))
    rows = Rows(np.array([[3e38, -3e38, 1.0], [-3.4e38, -3.4e38, -3.4e38], [1e-40, 0.0, -1e-40]]), "fp32")
    yield stats_case("float32 range", rows, np.array([0, 1, 2]))
    for tokens, width in ((0, 8), (2, 0)):
        yield from both(f"[{tokens}, {width}]", Rows(np.zeros((tokens, width)), "bf16", padding=8), random, True)


def ranks(random: Random) -> Iterator[Case]:
    """Shards of one vocabulary, whose statistics must add up to the whole's; padding fills the last ranks."""
    for size in range(1, 9):
        for vocab in (3, 61, 1000):
            dtype = NAMES[(size + vocab) % 3]
            whole = Rows(logits(random, 3, vocab), dtype, temperature=0.8)
            targets_T = random.integers(0, vocab, 3)
            wanted_TS = stats_reference(whole.x_TV, targets_T)
            log_z_T = wanted_TS[:, 0] + np.log(wanted_TS[:, 1])
            entropy_T = np.log(wanted_TS[:, 1]) - wanted_TS[:, 3] / wanted_TS[:, 1]
            grads = Gradients(*random.standard_normal((2, 3)).astype(np.float32))
            width = -(-vocab // size)
            found: dict[int, Array] = {}
            for rank in range(size):
                name = f"rank {rank} of {size} vocab {vocab}"
                start = rank * width
                part_TV = whole.logits_TV[:, start : start + width]
                padding = width - part_TV.shape[1]
                rows = Rows(part_TV, dtype, padding, start=start, temperature=0.8, shift=rank)
                collect = collector(name, rank, size, found, wanted_TS, stats_tolerance(whole.x_TV, wanted_TS))
                yield stats_case(f"{name} stats", rows, targets_T, also=collect)
                yield backward_case(f"{name} backward", rows, targets_T, grads, log_z_T=log_z_T, entropy_T=entropy_T)


def collector(
    name: str, rank: int, size: int, found: dict[int, Array], wanted_TS: Array, tolerance_TS: Array
) -> Callable[[Array], None]:
    """Checks the combination once all ranks' statistics are there."""

    def collect(part_TS: Array) -> None:
        found[rank] = part_TS
        if len(found) == size:
            whole_TS = combine(np.stack(list(found.values())))
            found.clear()
            expect(name, "combination", whole_TS, wanted_TS, 3 * tolerance_TS + 1e-6)

    return collect


def random_pack(random: Random, lengths: Array | None = None, spread: float = 1e-3) -> Pack:
    if lengths is None:
        lengths = np.array([log_uniform(random, 400) - 1 for _ in range(log_uniform(random, 12))])
    tokens = int(lengths.sum())
    mask_T = random.random(tokens) < random.choice([0.0, 0.3, 0.9, 1.0], p=[0.05, 0.3, 0.35, 0.3])
    old_T = -random.exponential(1.0, tokens)
    new_T = old_T + spread * random.standard_normal(tokens)
    per_token = bool(random.integers(2))
    # What stands off the response must not matter.
    old_T[~mask_T], new_T[~mask_T] = np.nan, -np.inf
    advantages = random.standard_normal(tokens if per_token else len(lengths))
    advantages[random.random(advantages.shape) < 0.2] = 0.0
    return Pack(lengths, mask_T, new_T.astype(np.float32), old_T.astype(np.float32), advantages, per_token)


def packs(random: Random) -> Iterator[Case]:
    shapes: tuple[list[int], ...] = (
        [1],
        [0],
        [0, 0, 5],
        [1, 0, 1, 0],
        [31, 32, 33],
        [511, 512, 513],
        [7] * 40,
        [3000, 1, 0, 200],
        [],
    )
    for lengths in shapes:
        for spread in (0.0, 1e-3, 2.0):
            pack = random_pack(random, np.array(lengths, dtype=np.int64), spread)
            yield reduce_case(f"lengths {lengths} spread {spread}", pack, num_sms=1 + len(lengths) % 3)
    yield from overflowing()


def overflowing() -> Iterator[Case]:
    """Ratios beyond float64: nothing for A = 0, the clip for A > 0, infinity for A < 0, by sequence and by token."""
    lengths_N, mask_T = np.array([2, 3, 1, 4]), np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=bool)
    new_T, old_T = (np.full(10, value, dtype=np.float32) for value in (-1.0, -801.0))
    by_token = np.array([1.0, 0.0, 0.0, 5.0, 0.0, -1.0, 1.0, -2.0, 5.0, 0.0])
    for advantages, per_token in ((np.array([1.0, 0.0, -1.0, 0.5]), False), (by_token, True)):
        pack = Pack(lengths_N, mask_T, new_T, old_T, advantages, per_token)
        yield reduce_case(f"overflowing ratios, per token {per_token}", pack, num_sms=2)


def context_ranks(random: Random) -> Iterator[Case]:
    """Parts of sequences: each rank's sums, then each rank's outputs from the sums over all of them."""
    for size in (2, 3, 8):
        lengths = np.array([200, 3, 1, 77])
        parts = [random_pack(random, lengths // size + (rank < lengths % size)) for rank in range(size)]
        advantages = random.standard_normal(len(lengths))
        parts = [
            Pack(part.lengths_N, part.mask_T, part.log_probs_T, part.old_log_probs_T, advantages) for part in parts
        ]
        whole_N2 = sum(part.sums() for part in parts)
        for rank, part in enumerate(parts):
            name = f"context rank {rank} of {size}"
            yield reduce_case(f"{name} partial", part, PARTIAL)
            yield reduce_case(f"{name} finish", part, FINISH, np.asarray(whole_N2))


def refused() -> Iterator[Case]:
    """Arguments that the launchers must refuse with cudaErrorInvalidValue, touching nothing."""
    random = np.random.default_rng(3)
    stats, backward = both("refused", Rows(logits(random, 2, 9), "fp32"), random, entropy=True)
    reduce = reduce_case("refused", random_pack(random, np.array([3, 4])))
    wrong_rows: tuple[dict[str, float], ...] = (
        {"element_type": 3},
        {"num_tokens": -1},
        {"vocab": -1},
        {"vocab": 2**30 + 1, "columns": 2**30 + 1, "row_stride": 2**31},
        {"row_stride": 8},
        *({"inverse_temperature": value} for value in (0.0, -1.0, np.nan, np.inf)),
    )
    for numbers in wrong_rows:
        yield refuse(stats, {name: value for name, value in numbers.items() if name in stats.numbers})
        yield refuse(backward, numbers)
    yield refuse(stats, {"entropy": 2})
    yield refuse(backward, {"vocab": 10})
    for case, optional in ((stats, ()), (backward, ()), (reduce, ("mask_T", "log_probs_T", "old_log_probs_T"))):
        for name in case.buffers:
            if name not in (*optional, "grad_log_probs_T" if case is reduce else ""):
                yield refuse(case, {}, without=name)
    yield refuse(
        replace(stats, buffers={**stats.buffers, "logits_TV": replace(stats.buffers["logits_TV"], offset=1)}), {}
    )
    for name, value in (("phases", 0), ("phases", 4), ("num_sequences", -1), ("clip_low", -1.0), ("clip_high", np.nan)):
        yield refuse(reduce, {name: value})


def refuse(case: Case, numbers: dict[str, float], without: str = "") -> Case:
    """case with other numbers, or without a buffer."""
    buffers = {name: buffer for name, buffer in case.buffers.items() if name != without}
    name = f"refused {case.kernel} {numbers} {without}"

    def check(outputs: Outputs) -> None:
        for what, buffer in buffers.items():
            expect(name, f"{what} bytes", outputs[what].view(np.uint8), buffer.data.view(np.uint8), 0)

    return replace(
        case, name=name, numbers={**case.numbers, **numbers}, buffers=buffers, check=check, traffic=None, status=1
    )


def far_rows() -> list[Case]:
    """Rows that start more than 2^31 elements apart, where a 32-bit index wraps; for the interpreter."""
    random = np.random.default_rng(2)
    stride = 2**31 + 8
    found = []
    for case in both("far rows", Rows(logits(random, 3, 300), "bf16"), random, entropy=True):
        memory = case.buffers["logits_TV"]
        rows = replace(memory, data=memory.data.reshape(3, 300), stride=stride * BYTES["bf16"])

        def check(outputs: Outputs, close: Case = case) -> None:
            close.check({**outputs, "logits_TV": outputs["logits_TV"].reshape(-1)})

        numbers = {**case.numbers, "row_stride": stride}
        found.append(replace(case, numbers=numbers, buffers={**case.buffers, "logits_TV": rows}, check=check))
    return found


def traffic_cases() -> tuple[Case, Case]:
    """Forward and backward at Qwen3's vocabulary, every token with a gradient."""
    random = np.random.default_rng(1)
    rows = Rows(logits(random, 4, QWEN3_COLUMNS), "bf16")
    targets_T = random.integers(0, QWEN3_COLUMNS, rows.tokens)
    grads = Gradients(np.ones(rows.tokens, dtype=np.float32))
    return stats_case("forward", rows, targets_T, entropy=False), backward_case("backward", rows, targets_T, grads)


def large(case: Case) -> Case:
    return replace(case, small=False)
