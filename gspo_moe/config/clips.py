"""Which clips make sense for which policy loss. Torch-free."""

from __future__ import annotations

import math

WIDE_CLIP = 0.01
SEQUENCE_LEVEL = ("gspo", "gspo_token")  # what they clip
WHOLE_SEQUENCES = ("gspo", "gmpo", "rspo")  # one term a sequence: no weights or advantages a token
TOKEN_MEAN = ("ppo", "dapo", "cispo")  # every token of a mini-batch counts the same
# Each paper's own values. 2506.13585 prints none for cispo: no lower bound, and weights up to 5 as in 2510.13786.
DEFAULT_CLIPS = {
    "ppo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "gspo_token": (3e-4, 4e-4),
    "grpo": (0.2, 0.27),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "cispo": (1.0, 4.0),
    "gmpo": (1.0 - math.exp(-0.4), math.exp(0.4) - 1.0),
    "rspo": (1.0 - math.exp(-0.4), math.exp(0.4) - 1.0),
}


def clip_fault(name: str, low: float, high: float, allow_wide: bool, prefix: str = "") -> str | None:
    """What is wrong with these clips for that loss, with the fix, or None; `prefix` stands before each key."""
    values = f"{prefix}clip_low={low:g} with {prefix}clip_high={high:g}"
    default_low, default_high = DEFAULT_CLIPS[name]
    paper = f"the default is {default_low:.3g} and {default_high:.3g}"
    if name in SEQUENCE_LEVEL:
        if max(low, high) >= WIDE_CLIP and not allow_wide:
            return (
                f"{values} switches clipping off for the sequence ratio of {name} (the paper uses 3e-4 and 4e-4); "
                f"lower both below {WIDE_CLIP:g} or set {prefix}allow_wide_clip=true"
            )
        return None
    if max(low, high) < WIDE_CLIP:
        return (
            f"{values} is made for a sequence ratio and clips nearly every token ratio of {name}; raise one of them to "
            f"{WIDE_CLIP:g} or more, or leave both out ({paper})"
        )
    if low > 1.0 or (low == 1.0 and name != "cispo"):
        allowed = "at most 1, which is no lower bound" if name == "cispo" else "below 1"
        return f"{values}: the lower bound 1 - clip_low is of a ratio; set {prefix}clip_low {allowed} ({paper})"
    return None
