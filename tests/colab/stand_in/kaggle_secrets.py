"""A stand-in for Kaggle's module of that name: STAND_IN_SECRETS is a JSON object of secrets."""

import json
import os


class BackendError(Exception):
    """What Kaggle raises where no secret of that label is attached to the notebook."""


class UserSecretsClient:
    """Reads the secrets that are attached to the notebook."""

    def get_secret(self, label):
        secrets = json.loads(os.environ.get("STAND_IN_SECRETS", "{}"))
        if label not in secrets:
            raise BackendError(f"No user secrets exist for kernel id 1 and label {label}.")
        return secrets[label]
