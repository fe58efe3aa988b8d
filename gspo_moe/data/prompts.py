"""Prompts in order, with a position that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gspo_moe.errors import ConfigError
from gspo_moe.types import OrderedPrompts, Prompt, Prompts


@dataclass(frozen=True)
class PromptPosition:
    """next: how many places of the split's endless order have been given out, the place of the first that has not.

    pending: those before it whose prompts are not done, rising.
    """

    next: int = 0
    pending: tuple[int, ...] = ()


class PromptSource:
    """Gives one split's prompts in order and, where a resume finds some not done, these first.

    Finite prompts begin again at their end: place p is prompt p mod size, unless they have an order of their own. From
    the second epoch on its uid has `/epoch2` and so on behind it, so that the same prompt is not answered with the same
    random numbers again.
    """

    def __init__(self, prompts: Prompts, split: str, position: PromptPosition = PromptPosition()) -> None:
        self._prompts = prompts
        self._split = split
        self._size = prompts.size(split)
        if self._size is not None and self._size < 1:
            raise ConfigError(
                f"the task has no prompts in its split {split!r}; give it at least one (task.data.{split}, or "
                "task.options)"
            )
        self._next = position.next
        self._again = list(position.pending)
        self._open: dict[str, int] = {}

    @property
    def position(self) -> PromptPosition:
        """From where another source goes on: what is taken and not done comes again."""
        return PromptPosition(self._next, tuple(sorted((*self._again, *self._open.values()))))

    def take(self, count: int) -> list[Prompt]:
        """`count` prompts; each is pending until it is `done`."""
        again, self._again = self._again[:count], self._again[count:]
        new = range(self._next, self._next + count - len(again))
        self._next = new.stop
        return [self._take(place) for place in (*again, *new)]

    def done(self, prompts: Iterable[Prompt]) -> None:
        """Marks prompts that were taken as used, in whatever order."""
        for prompt in prompts:
            del self._open[prompt.uid]

    def _take(self, place: int) -> Prompt:
        if isinstance(self._prompts, OrderedPrompts):
            epoch, index = self._prompts.at(self._split, place)
        else:
            epoch, index = (0, place) if self._size is None else divmod(place, self._size)
        prompt = self._prompts.prompt(self._split, index)
        if epoch:
            prompt = replace(prompt, uid=f"{prompt.uid}/epoch{epoch + 1}")
        if prompt.uid in self._open:
            raise ConfigError(f"the task gives two prompts of its split {self._split!r} the uid {prompt.uid!r}")
        self._open[prompt.uid] = place
        return prompt
