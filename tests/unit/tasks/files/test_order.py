"""The order of prompts: epochs, mixtures, and the same place wherever one begins."""

from __future__ import annotations

from gspo_moe.tasks.files.order import Order


def test_each_epoch_is_another_permutation_of_the_seed() -> None:
    order, places = Order((3, 4), seed="1/train"), range(21)
    epochs = [[order.at(place) for place in places[start : start + 7]] for start in (0, 7, 14)]
    assert [{epoch for epoch, _ in one} for one in epochs] == [{0}, {1}, {2}]
    numbers = [[number for _, number in one] for one in epochs]
    assert all(sorted(one) == list(range(7)) for one in numbers)
    assert len({tuple(one) for one in numbers}) == 3
    other = Order((3, 4), seed="1/train")
    assert [other.at(place) for place in reversed(places)] == [order.at(place) for place in reversed(places)]
    assert [Order((3, 4), seed="2/train").at(place)[1] for place in range(7)] != numbers[0]
    assert [Order((3, 4)).at(place) for place in (0, 6, 7)] == [(0, 0), (0, 6), (1, 0)]


def test_of_a_mixture_every_stretch_has_its_shares_and_each_file_its_own_epochs() -> None:
    sizes, weights, shares = (5, 50, 7), (1.0, 6.0, 3.0), (0.1, 0.6, 0.3)
    order = Order(sizes, weights, seed="1/train")
    found = [order.at(place) for place in range(400)]
    bounds = (0, 5, 55, 62)
    for file, share in enumerate(shares):
        inside = [bounds[file] <= number < bounds[file + 1] for _, number in found]
        assert all(abs(sum(inside[:end]) - share * end) <= 1 for end in range(401))
        own = [one for one, here in zip(found, inside, strict=True) if here]
        for epoch in range(len(own) // sizes[file]):
            part = own[epoch * sizes[file] : (epoch + 1) * sizes[file]]
            assert sorted(part) == [(epoch, number) for number in range(bounds[file], bounds[file + 1])]
    assert Order(sizes, weights, seed="1/train").at(399) == found[399]
