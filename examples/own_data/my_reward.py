"""A reward of one's own: what it takes, it says by its parameters' names (docs/rewards.md)."""


def closeness(response: str, answer: str) -> dict[str, float]:
    """Parts, logged by name; their sum is the reward, 1 for the right number and less the further off it is."""
    number = response.strip()
    if not number.isdecimal():
        return {"digits": 0.2 * sum(map(str.isdecimal, number)) / (len(number) + 1), "close": 0.0}
    return {"digits": 0.2, "close": 0.8 / (1 + abs(int(number) - int(answer)))}
