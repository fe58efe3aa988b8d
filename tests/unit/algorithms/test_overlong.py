"""The soft over-long punishment, equation 13 of arXiv 2503.14476."""

import torch

from gspo_moe.algorithms.overlong import overlong_penalty


def test_the_papers_own_numbers() -> None:
    lengths = torch.tensor([1, 16384, 16385, 18432, 20479, 20480])
    expected = [0.0, 0.0, -1 / 4096, -0.5, -4095 / 4096, -1.0]
    assert overlong_penalty(lengths, 20480, 4096).tolist() == expected
