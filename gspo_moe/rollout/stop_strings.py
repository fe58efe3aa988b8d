"""Stop strings of text: where an answer ends that holds one, whatever tokens it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_moe.data.tokenizers import Tokenizer

BROKEN = "\ufffd"  # how decoding shows a part of a character


class StopStrings:
    """Finds strings in sampled answers. Most tokens can complete none of them, and cost a look into a set.

    strings: none of them empty. completing: ids of the tokens that a string can end in; with one of them an answer's
    last tokens are decoded, as many as the longest string has bytes. It decodes the whole vocabulary once.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._longest = max(len(string.encode()) for string in strings)
        # Behind another token, since some tokenizers drop a space that a text begins with.
        before = tokenizer.encode("a")
        cut = len(tokenizer.decode(before))
        texts = [tokenizer.decode([*before, token])[cut:] for token in range(tokenizer.vocab_size)]
        ends = tuple({string[at:] for string in strings for at in range(len(string))})
        if not all(string.isascii() for string in strings):
            ends += (BROKEN,)  # may be the rest of a character
        self.completing = frozenset(
            token for token, text in enumerate(texts) if text.startswith(ends) or any(one in text for one in strings)
        )
        self._silent = frozenset(token for token, text in enumerate(texts) if not text)

    def ended(self, response_ids: Sequence[int]) -> bool:
        """Whether an answer whose earlier tokens hold no string holds one with its last."""
        if response_ids[-1] not in self.completing:
            return False
        start, spoken = len(response_ids), 0
        while start and spoken <= self._longest:  # one more than the string needs: its first may lose a space
            start -= 1
            spoken += response_ids[start] not in self._silent
        return self._first(self._tokenizer.decode(response_ids[start:])) is not None

    def cut(self, text: str) -> str:
        """The text before the first string in it; all of it where it holds none."""
        return text[: self._first(text)]

    def _first(self, text: str) -> int | None:
        return min((at for one in self.strings if (at := text.find(one)) >= 0), default=None)


def make_stop_strings(tokenizer: Tokenizer, stop: Sequence[str]) -> StopStrings | None:
    """Finds those of `rollout.stop` which are made of several tokens, or of another one than their own.

    None where each string's own token is all that can end it. A special token's word is that token alone: the same
    word spelled with others is text.
    """
    encoded = {text: tokenizer.encode(text) for text in stop}
    own = {ids[0] for ids in encoded.values() if len(ids) == 1}
    special = frozenset[int]() if tokenizer.special is None else tokenizer.special.ids
    ordinary = [text for text, ids in encoded.items() if len(ids) != 1 or ids[0] not in special]
    found = StopStrings(ordinary, tokenizer) if ordinary else None
    return None if found is None or found.completing <= own else found
