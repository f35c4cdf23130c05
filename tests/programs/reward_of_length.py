"""A reward of a user's own, for a model that can't answer anything yet."""


def of_length(item, answer):
    return 1 + len(answer)
