"""The key symbol at the left of Colab's window: secrets that the user grants to a notebook."""

import json
import os


class SecretNotFoundError(AttributeError):
    """There is no secret of that name."""


class NotebookAccessError(AttributeError):
    """The secret is there, but the user has not granted it to this notebook."""


class TimeoutException(TimeoutError):
    """Nobody answered: there is no browser behind this kernel."""


def get(key):
    """The secret `key`; a value of null stands for one that was not granted to this notebook."""
    if "STAND_IN_SECRETS" not in os.environ:
        raise TimeoutException(
            f"Requesting secret {key} timed out. Secrets can only be fetched from the Colab UI."
        )
    secrets = json.loads(os.environ["STAND_IN_SECRETS"])
    if key not in secrets:
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    if secrets[key] is None:
        raise NotebookAccessError(f"Notebook does not have access to secret {key}")
    return secrets[key]
