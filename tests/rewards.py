"""A reward of one's own, as a user would write it."""


def every_other(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """1, 0, 1, 0, ...: every group has something to learn from, whatever a random model writes."""
    return [float(i % 2 == 0) for i in range(len(completions))]
