"""The datasets of reasoning-gym (github.com/open-thought/reasoning-gym) as tasks, with reasoning-gym's own rewards.

reasoning-gym makes entry i from a random stream seeded with `dataset seed + i`. The dataset seed is 0 here and i is
drawn from 32 bits, so entries depend on the task's own streams alone. The whole entry travels in `Prompt.reference`.
Its scorers may run an answer through `eval`-like parsers: call them in `pool.TaskPool`, never in the trainer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from random import Random
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from gspo_moe.errors import ConfigError
from gspo_moe.tasks.protocol import Task, last_answer
from gspo_moe.tasks.splits import draw_prompt
from gspo_moe.types import Conversation, Prompt

ENTRY_BITS = 32  # pool_matrix seeds NumPy, which takes no more
OURS = ("seed", "size")
_BY_HASH = "its entries differ in each process (they depend on Python's string hashes), so runs could not be repeated"
_NO_JSON = "it has entries that JSON does not preserve"
_FINITE = "it makes a fixed number of entries when it is made, and training needs them without end"
# Of reasoning-gym 0.1.x; `python -m gspo_moe.tasks.reasoning_gym_task` tries every data set.
REFUSED = {
    "acre": _FINITE,
    "arc_agi": _NO_JSON,
    "isomorphic_strings": _BY_HASH,
    "knight_swap": _BY_HASH,
    "list_functions": "it draws from a random stream that no seed sets, so runs could not be repeated",
    "polynomial_multiplication": _BY_HASH,
    "ransom_note": _BY_HASH,
    "rearc": _NO_JSON,
    "word_ladder": "it has as many entries as its `size`, and training needs them without end",
}
# They draw the templates of their first `size` entries at the start; of these any other entry takes one too.
TEMPLATES_BY_INDEX = ("gsm_symbolic",)

# The questions of these take hundreds of characters of instructions; what matters stands in the metadata.
SHORT_PROMPTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "number_sorting": lambda metadata: f"{metadata['direction']} {', '.join(metadata['original_numbers'])} =",
    "countdown": lambda metadata: f"{metadata['target']} from {', '.join(map(str, metadata['numbers']))} =",
    "chain_sum": lambda metadata: f"{metadata['expression']} =",
    "basic_arithmetic": lambda metadata: f"{metadata['expression']} =",
}


class ReasoningGym:
    """Prompts without end and rewards of one dataset; `options` are its config's fields, apart from `seed` and `size`.

    Raises ConfigError for an unknown dataset or option, a value that the dataset refuses, and a dataset that cannot
    give unlimited, reproducible entries.
    """

    def __init__(self, dataset: str, options: Mapping[str, Any], seed: int) -> None:
        self.name = f"reasoning_gym/{dataset}"
        self._short_prompt = SHORT_PROMPTS.get(dataset)
        self._dataset = _make_dataset(dataset, options)
        self._seed = seed
        self._try_out()

    def prompt(self, split: str, index: int) -> Prompt:
        return draw_prompt(self.name, self._seed, split, index, self._entry)

    def size(self, split: str) -> None:
        return None

    def demonstration(self, prompt: Prompt) -> str:
        answer = prompt.reference["answer"]
        if answer is None:
            raise ConfigError(f"task.name={self.name} has no reference answers, so stage sft cannot use it; change one")
        return str(answer)

    def reward(self, prompt: Prompt, turns: Conversation) -> float:
        return self._dataset.score_answer(last_answer(turns), prompt.reference)

    def _entry(self, random: Random) -> tuple[str, dict[str, Any]]:
        entry = _plain(self._dataset[random.getrandbits(ENTRY_BITS)])
        return self._short_prompt(entry["metadata"]) if self._short_prompt else entry["question"], entry

    def _try_out(self) -> None:
        """Draws one entry, so that what a dataset cannot do is known before the run starts."""
        number = Random(self._seed).getrandbits(ENTRY_BITS)
        try:
            original = self._dataset[number]
            entry = _plain(original)
            rewards = [self._dataset.score_answer(entry["answer"], one) for one in (original, entry)]
        except Exception as error:  # each of a hundred datasets has its own ways to refuse
            raise ConfigError(
                f"task.name={self.name} cannot give entry {number} ({type(error).__name__}: {error}); "
                "change task.options or choose another dataset"
            ) from error
        if rewards[0] != rewards[1]:
            raise ConfigError(f"task.name={self.name} has entries that JSON does not preserve; choose another dataset")


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as JSON keeps it; fractions, which gsm_symbolic's metadata have and no scorer reads, as text."""

    def text(value: Any) -> str:
        if not isinstance(value, Fraction):
            raise TypeError(f"{type(value).__name__} {value!r} is no JSON")
        return str(value)

    plain: dict[str, Any] = json.loads(json.dumps(entry, default=text))
    return plain


def reasoning_gym_task(dataset: str, options: Mapping[str, Any], seed: int) -> Task:
    """Raises ConfigError as `ReasoningGym` does."""
    gym = ReasoningGym(dataset, options, seed)
    return Task(gym.name, prompts=gym, rubric=gym, demonstrate=gym.demonstration)


def _make_dataset(dataset: str, options: Mapping[str, Any]) -> Any:
    if dataset not in DATASETS:
        nearest = get_close_matches(dataset, DATASETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"task.name=reasoning_gym/{dataset} is unknown; the nearest is reasoning_gym/{nearest}; reasoning-gym's "
            f"datasets are {', '.join(DATASETS)}"
        )
    if dataset in REFUSED:
        raise ConfigError(
            f"task.name=reasoning_gym/{dataset} cannot be used: {REFUSED[dataset]}; choose another dataset"
        )
    fields = [field.name for field in dataclasses.fields(DATASETS[dataset][1]) if field.name not in OURS]
    for key, value in options.items():
        if key in OURS:
            raise ConfigError(f"task.options.{key}={value!r} is the program's own to set; remove it, and set `seed`")
        if key not in fields:
            nearest = get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown key task.options.{key}={value!r}; the nearest valid key is task.options.{nearest}"
            )
    try:
        made = reasoning_gym.create_dataset(dataset, seed=0, **options)
        if dataset in TEMPLATES_BY_INDEX:
            made.task_indices = _Endless(made.task_indices)
        return made
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"task.options={dict(options)}: reasoning_gym/{dataset} refuses them: {error}") from error


class _Endless:
    """A list that begins again at its end."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = values

    def __getitem__(self, index: int) -> int:
        return self._values[index % len(self._values)]


def _main() -> None:
    """Tries every data set with its own defaults, and says which cannot be used and why."""
    faults = {}
    for dataset in DATASETS:
        try:
            ReasoningGym(dataset, {}, seed=1)
        except ConfigError as error:
            faults[dataset] = str(error)
    print(f"{len(DATASETS) - len(faults)} of reasoning-gym's {len(DATASETS)} data sets can be used; not these:")
    print(*faults.values(), sep="\n")


if __name__ == "__main__":
    _main()
