"""Convert a configuration to plain data, and remove secrets before it is written to disk."""

import copy
import re
from collections.abc import Mapping
from typing import Any

SECRET_PARTS = ("token", "api_key", "access_key", "password", "secret", "credential", "authorization")
SECRET_NAMES = ("key", "auth")
PASSWORD_IN_URL = re.compile(r"(?<=://)([^/?#\s:@]*):[^/?#\s]*@")


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration without the string values of keys that look like secrets, nor passwords in URLs.

    A value that is itself a secret under a harmless key cannot be told from others.
    """
    return {
        key: value if key == "special_tokens" else _without_secrets(value)
        for key, value in config.items()
        if not (isinstance(value, str) and _names_a_secret(str(key).lower()))
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return PASSWORD_IN_URL.sub(r"\1:***@", value) if isinstance(value, str) else value


def _names_a_secret(key: str) -> bool:
    key = key.replace("-", "_")
    return (any(part in key for part in SECRET_PARTS) or key in SECRET_NAMES) and not key.startswith("tokenizer_")


def plain(value: Any) -> Any:
    """Return a deep copy as plain dicts and lists, because Axolotl's mappings return None for missing keys."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(exclude_none=True))
    return copy.deepcopy(value)
