"""What every section of the configuration is made from. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("neither true nor false is a value of this key; write what it takes, or leave it out")
        return value

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        found = list(self.faults())
        if found:
            raise ValueError("\n".join(found))
        return self

    def faults(self) -> Iterator[str]:
        """What keys of this section, each of them valid, cannot be together; every one with key, value and fix."""
        yield from ()
