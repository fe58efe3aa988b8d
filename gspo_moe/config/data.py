"""The section `task.data`: prompts from files of the user's own. Torch-free, and light: reward workers import it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat

from gspo_moe.section import Section

Format = Literal["auto", "verl", "gsm8k", "aime", "livecodebench", "codeforces"]


COLUMNS = ("prompt", "messages", "answer", "demonstration", "system", "uid")


def _known(value: dict[str, str]) -> dict[str, str]:
    unknown = [name for name in value if name not in COLUMNS]
    if unknown:
        raise ValueError(f"columns.{unknown[0]} is none of {', '.join(COLUMNS)}; name one of these and its column")
    return value


Columns = Annotated[dict[str, str], AfterValidator(_known)]


class DataFile(Section):
    """Records of one source. A path alone stands for the section.

    path: a .jsonl, .json or .parquet file, a folder of such, or a data-set folder of Hugging Face's `datasets`.
    split: of a data-set folder with several.
    format: how a record becomes a prompt; `auto` goes by its columns. columns: over those of `task.data.columns`.
    weight: of its share in a mixture; without weights every record comes once an epoch.
    reward: what rewards its answers, in place of `task.reward`, as `task.reward.name`.
    limit: only its first records.
    """

    path: str
    split: str | None = None
    format: Format = "auto"
    columns: Columns = Field(default_factory=dict)
    weight: PositiveFloat | None = None
    reward: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


def _listed(value: Any) -> Any:
    files = value if isinstance(value, list | tuple) else [value]
    return [{"path": one} if isinstance(one, str) else one for one in files]


Files = Annotated[tuple[DataFile, ...], BeforeValidator(_listed)]


class DataConfig(Section):
    """Files of each split; a path, or a list of paths and of sections.

    train: for stage rl. sft: demonstrations, for stage sft; without files, those of `train`. eval: held out.
    held_out: records taken out of `train` for evaluation, drawn by `seed`, where `eval` names no file.
    columns: of a record, by dotted path: `prompt` (text or messages), `messages`, `answer` (what a reward compares
    with), `demonstration` (what stage sft learns), `system` and `uid`.
    system: a system message for prompts without one. template: text with {column} fields that makes the prompt.
    shuffle: another order in every epoch. on_bad_record: one that cannot be read ends the run, or is left out, counted.
    """

    train: Files = ()
    eval: Files = ()
    sft: Files = ()
    held_out: NonNegativeInt = 0
    columns: Columns = Field(default_factory=dict)
    system: str | None = None
    template: str | None = None
    shuffle: bool = True
    on_bad_record: Literal["error", "skip"] = "error"

    def faults(self) -> Iterator[str]:
        if not (self.train or self.eval or self.sft):
            yield "task.data names no file; set task.data.train"
        if self.held_out and self.eval:
            yield f"task.data.held_out={self.held_out} and task.data.eval both hold prompts out; leave one of them out"
        for split, files in (("train", self.train), ("eval", self.eval), ("sft", self.sft)):
            weights = [one.weight for one in files]
            if any(weights) and not all(weights):
                yield f"task.data.{split}: some files have a weight and some have none; give each one, or none"
            if any(weights) and split == "eval":
                yield "task.data.eval: weights are for training, and each held-out prompt counts once; leave them out"
