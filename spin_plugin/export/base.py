"""What a run started from, as its model card names it: no directories of this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """A base model."""

    name: str
    """Its name on the hub, or that of its directory."""
    on_hub: str | None
    """The model on the hub: itself or, for a directory, the one that its card names as its base."""
    license: dict[str, Any] = field(default_factory=dict)
    """The card's fields on its licence; empty if unknown."""


def read_base(config: Mapping[str, Any]) -> Base:
    """Read the base model of a run: its card in its directory or, if it can be reached, on the hub.

    Args:
        config: the user's configuration in run.json.
    """
    model = str(config["base_model"])
    hub_name = hub_name_of(model)
    data = _card_data(model, config.get("revision_of_model"), on_hub=hub_name is not None)
    named = data.get("base_model")
    known = {name: data[name] for name in LICENSE_FIELDS if data.get(name)}
    return Base(shown(model), hub_name or (hub_name_of(named) if isinstance(named, str) else None), known)


def hub_name_of(name: str) -> str | None:
    """Return a name of a model or data set if it can be one on the hub; None for a path or a URL.

    A name whose first part is a directory here is a path, too, even if nothing is there any more: `outputs/sft`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    here = Path(name).exists() or ("/" in name and Path(name).parent.exists())
    if here or Path(name).suffix in (".json", ".jsonl", ".parquet", ".csv", ".txt", ".arrow"):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name[0].isalnum() else None


def shown(name: str) -> str:
    """Return a name on the hub unchanged, and the last part of a path."""
    return hub_name_of(name) or Path(name).name


def data_names(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the names of a configuration's data sets as a card shows them, and whether each can be one on the hub."""
    names: dict[str, bool] = {}
    for entry in config.get("datasets") or []:
        path, files = str(entry.get("path") or ""), entry.get("data_files") or []
        if files and "/" not in path:  # a format, as `json`
            names |= {Path(file).name: False for file in ([files] if isinstance(files, str) else files)}
        elif path:
            names[shown(path)] = hub_name_of(path) is not None
    return names


def _card_data(model: str, revision: str | None, *, on_hub: bool) -> dict[str, Any]:
    """Return the front matter of a model's card; empty if there is none, or the hub cannot be reached."""
    import yaml
    from httpx import HTTPError
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        file = Path(hf_hub_download(model, "README.md", revision=revision) if on_hub else Path(model) / "README.md")
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, RuntimeError, HTTPError, yaml.YAMLError):
        return {}
