"""A covering part of the layout matrix; the whole of it is `python tools/check_layouts.py`."""

from __future__ import annotations

from gspo_moe.config.layout import FIXES_EXPERT_GRADIENTS
from gspo_moe.platform import megatron_version
from tools.check_layouts import TOLERANCE, run
from tools.layout_cases import WITHOUT_EXPERT_TENSOR, Case, cases, refused

# Every axis at least once, and those that meet in one code path together: sequence parallelism with padding, uneven
# gathers, split sequences, interleaved schedules, tied embeddings over stages, the distributed optimizer's shards.
COVERING = (
    "1: schedule.micro_batch_tokens=48",
    "2: expert=2 distributed_optimizer=true schedule.micro_batch_tokens=48",
    "2: tensor=2 expert=2 expert_tensor=1 dispatcher=allgather schedule.micro_batch_tokens=48",
    "2: pipeline=2 recompute=full schedule.micro_batch_tokens=48",
    "2: pipeline=2 virtual_pipeline=2 schedule.micro_batch_tokens=48",
    "4: tensor=2 expert=2",
    "4: context=2 tensor=2",
    "4: context=2 pipeline=2 virtual_pipeline=2 expert=2 schedule.micro_batch_tokens=48",
    "4: pipeline=2 expert=2 distributed_optimizer=true recompute=selective",
    "4: tensor=2 pipeline=2 model.overrides.tie_word_embeddings=true",
)


def test_layouts_give_the_numbers_of_one_process_and_refused_ones_do_not() -> None:
    assert set(COVERING) <= {case.name for case in cases()}
    results = run([], [*COVERING, *(case.name for case in refused())])
    assert {case.name for case, _ in results} == {*COVERING, *(case.name for case in refused())}
    for case, worst in results:
        if _wrong_here(case):
            assert max(worst["gradients"], worst["parameters"]) > 1e-3, f"{case.name}: {worst}"
        else:
            assert max(worst.values()) <= TOLERANCE, f"{case.name}: {worst}"


def _wrong_here(case: Case) -> bool:
    """Whether the installed megatron-core has the fault for which the layout is refused."""
    version = tuple(int(part) for part in megatron_version().split(".")[:2])
    return bool(case.wrong) and (case.wrong != WITHOUT_EXPERT_TENSOR or version < FIXES_EXPERT_GRADIENTS)
