"""tools/peer_curves.py on rewards by hand, and TRL's tokenizer against ours."""

from __future__ import annotations

import pytest

from gspo_moe.data.tokenizers import SentencePieceTokenizer
from tools.curves_trl import same_tokenizer
from tools.peer_curves import agreements


def test_curves_agree_within_the_noise_of_seeds() -> None:
    ours = [[0.0, 0.5, 1.0], [0.25, 0.5, 0.75], [0.5, 0.5, 0.5]]  # each 0.5 on average, the last 1, 0.75, 0.5
    trl = [
        [0.0, 0.25, 0.5],
        [0.25, 0.5, 0.75],
        [0.5, 0.75, 1.0],
    ]  # 0.25, 0.5, 0.75 on average, the last the same + 0.25
    whole, last = agreements(ours, trl)
    assert (whole.difference, whole.agrees) == (0.0, True)
    # Variances 0 and 1/16, three seeds each: 2.776 * sqrt(1/48).
    assert whole.half_width == pytest.approx(2.776 * 0.14433757)
    assert last.window == "steps 3 to 3"
    assert last.half_width == pytest.approx(2.776 * 0.20412415)
    apart, _ = agreements(ours, [[0.75, 0.75, 0.75], [0.75, 0.75, 0.72], [0.75, 0.75, 0.78]])
    assert apart.difference == pytest.approx(-0.25)
    assert not apart.agrees


def test_the_tokenizer_for_trl_gives_our_ids() -> None:
    ours = SentencePieceTokenizer.train(["qebaz>abeqz", "a b>"], 512)
    texts = ["qebaz>", "a  b", "zé 漢>"]  # the last has characters that go in as their bytes
    theirs = same_tokenizer(ours, texts)
    assert theirs.eos_token_id == ours.eos_id
    ids = [*ours.encode("ab"), 0, *ours.encode("z")]  # a sampled unknown piece stays in the text that a reward sees
    assert theirs.decode([*ids, ours.eos_id], skip_special_tokens=True) == "ab<unk>z"
