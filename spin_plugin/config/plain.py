"""Convert a configuration to plain data, and remove secrets before it is written to disk."""

import copy
from collections.abc import Mapping
from typing import Any

SECRET_PARTS = ("token", "api_key", "password", "secret", "credential")


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration without the string values of keys that look like secrets."""
    return {
        key: value if key == "special_tokens" else _without_secrets(value)
        for key, value in config.items()
        if not (isinstance(value, str) and _names_a_secret(str(key).lower()))
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def _names_a_secret(key: str) -> bool:
    return any(part in key for part in SECRET_PARTS) and not key.startswith("tokenizer_")


def plain(value: Any) -> Any:
    """Return a deep copy as plain dicts and lists, because Axolotl's mappings return None for missing keys."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(exclude_none=True))
    return copy.deepcopy(value)
