"""In which order prompts come, without end: a permutation of each epoch, or a mixture of files by weight.

Every place follows from the sizes, the weights and the seed alone, so that all processes and every resume agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random


@dataclass
class Order:
    """sizes: prompts of each file, which are numbered through. weights: of each file, none without a mixture.

    seed: of the permutations; None leaves prompts as they stand.
    Without weights an epoch goes over all files together. With them each place belongs to one file, so that of any
    number of places each file has its share, to within about one; a file's own prompts come in epochs of its own.
    """

    sizes: Sequence[int]
    weights: Sequence[float] = ()
    seed: str | None = None
    _permutations: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    _drawn: list[tuple[int, int]] = field(default_factory=list)  # of each place: the file, and how often before
    _counts: list[int] = field(default_factory=list)

    def at(self, place: int) -> tuple[int, int]:
        """(epoch, number) of the prompt at a place, all from 0; an epoch counts how often that prompt came before."""
        if not self.weights:
            epoch, index = divmod(place, sum(self.sizes))
            return epoch, self._shuffled(0, sum(self.sizes), epoch, index)
        file, before = self._draw(place)
        epoch, index = divmod(before, self.sizes[file])
        return epoch, sum(self.sizes[:file]) + self._shuffled(file, self.sizes[file], epoch, index)

    def _shuffled(self, file: int, size: int, epoch: int, index: int) -> int:
        if self.seed is None:
            return index
        if (file, epoch) not in self._permutations:
            numbers = list(range(size))
            Random(f"{self.seed}/{file}/{epoch}").shuffle(numbers)
            # The epoch before may still be asked for: prompts that were not done come again.
            self._permutations = {
                (of, at): kept for (of, at), kept in self._permutations.items() if of != file or at == epoch - 1
            }
            self._permutations[file, epoch] = numbers
        return self._permutations[file, epoch][index]

    def _draw(self, place: int) -> tuple[int, int]:
        """Each place goes to the file that is furthest behind its share."""
        total = sum(self.weights)
        self._counts = self._counts or [0] * len(self.weights)
        while len(self._drawn) <= place:
            done = len(self._drawn) + 1
            behind = [weight * done / total - count for weight, count in zip(self.weights, self._counts, strict=True)]
            file = behind.index(max(behind))
            self._drawn.append((file, self._counts[file]))
            self._counts[file] += 1
        return self._drawn[place]
