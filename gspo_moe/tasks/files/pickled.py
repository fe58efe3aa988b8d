"""The text in a pickle of one text, found without unpickling: a pickle can run any code."""

from __future__ import annotations

import pickletools

from gspo_moe.errors import DataError

TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
FRAMING = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def pickled_text(content: bytes) -> str:
    """Raises DataError where the pickle holds anything but one text."""
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in TEXTS:
                texts.append(str(argument))
            elif opcode.name not in FRAMING:
                raise DataError(f"its pickle has {opcode.name}, and may hold one text only")
    except ValueError as error:
        raise DataError(f"its pickle cannot be read ({error})") from None
    if len(texts) != 1:
        raise DataError(f"its pickle holds {len(texts)} texts, and may hold one only")
    return texts[0]
