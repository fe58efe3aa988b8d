"""Which ids end a generation: what a model's `eos_token_id` names, beside the tokenizer's own end token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.plain_json import read_object

GENERATION_FILE = "generation_config.json"
EOS_ID_FILES = (GENERATION_FILE, "config.json")  # the second counts where the first names none


@dataclass(frozen=True)
class EndTokens:
    """ids: of `eos_token_id` in `file`, in order; none where no file names any."""

    ids: tuple[int, ...] = ()
    file: Path | None = None

    def with_own(self, eos_id: int, vocab_size: int) -> tuple[int, ...]:
        """The tokenizer's `eos_id` and then all others. Raises DataError for ids that the tokenizer does not have."""
        beyond = [one for one in self.ids if not 0 <= one < vocab_size]
        if beyond:
            raise DataError(
                f"{self.file}: eos_token_id={beyond} is outside the tokenizer's {vocab_size} tokens; correct it, or "
                f"name the end tokens in a {GENERATION_FILE} in the tokenizer's folder"
            )
        return tuple(dict.fromkeys((eos_id, *self.ids)))


NO_END_TOKENS = EndTokens()


def read_end_tokens(*folders: Path | None) -> EndTokens:
    """What the first of these folders that names any names. Raises DataError for what is no id or list of ids."""
    for file in (folder / name for folder in folders if folder is not None for name in EOS_ID_FILES):
        value = read_json(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in ids):
            raise DataError(f"{file}: eos_token_id={value!r} is neither an id nor a list of ids; correct it")
        if ids:
            return EndTokens(tuple(ids), file)
    return NO_END_TOKENS


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty where there is no file. Raises DataError for anything else."""
    if not file.is_file():
        return {}
    try:
        return read_object(file)
    except ValueError as error:
        raise DataError(f"{file} is no JSON object ({error}); export the tokenizer again") from error
