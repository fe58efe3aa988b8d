"""A reward of one's own: what it takes, it says by its parameters' names (docs/rewards.md)."""


def closeness(response: str, answer: str) -> dict[str, float]:
    """Parts, logged by name; their sum is the reward, 1 for the right number and less the further off it is."""
    if not response.strip().isdecimal():
        return {"number": 0.0, "close": 0.0}
    return {"number": 0.2, "close": 0.8 / (1 + abs(int(response) - int(answer)))}
