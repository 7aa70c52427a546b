"""Secrets as COLAB_SECRETS, a JSON object, describes them: name -> value, or name -> the exception to raise."""

import json
import os


class SecretNotFoundError(Exception):
    pass


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    pass


def get(key):
    value = json.loads(os.environ.get("COLAB_SECRETS", "{}")).get(key, "SecretNotFoundError")
    if value in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        raise globals()[value](key)
    return value
