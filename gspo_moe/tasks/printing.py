"""What rewards print, within bounds: the beginning and the end of it, and how much lies between."""

from __future__ import annotations


class Printed:
    """Of what is printed until `end`: half of `limit` bytes is shown as it comes, as much of the last at the end."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._clear()

    def _clear(self) -> None:
        self._room, self._dropped, self._last = self._half, 0, b""

    def take(self, printed: bytes) -> bytes:
        """What of it to show at once."""
        now, rest = printed[: self._room], printed[self._room :]
        self._room -= len(now)
        kept = self._last + rest
        cut = max(0, len(kept) - self._half)
        self._last, self._dropped = kept[cut:], self._dropped + cut
        return now

    def end(self) -> bytes:
        """What to show of the rest, with a line on what is left out; begins anew."""
        last, dropped = self._last, self._dropped
        self._clear()
        if not dropped:
            return last
        note = f"\n... {dropped} bytes that rewards printed are left out (task.reward.output_kb) ...\n"
        return note.encode() + last.rstrip(b"\n") + b"\n"
