"""`axolotl spin config-schema`: Axolotl's JSON schema with SPIN's keys in it, so that editors complete them."""

import json
from pathlib import Path
from typing import Any

import click
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, JsonSchemaWarningKind
from pydantic_core import PydanticSerializationError, core_schema

from spin_plugin.console import SpinError, exit_in_one_line, say


class _Schema(GenerateJsonSchema):
    """Some of Axolotl's types (torch's dtype) and defaults have no JSON form; what cannot be said is left out."""

    def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
        return {}

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:
            return {}

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """Nobody can act on it."""


@click.command("config-schema")
@click.option("--field", help="The schema of one key only.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, for an editor to read.")
@exit_in_one_line
def config_schema(field: str | None, output: Path | None) -> None:
    """Print the JSON schema of a whole SPIN configuration: Axolotl's keys, `rl: spin` and the `spin:` block.

    For a file use --output: Axolotl prints its logo before everything else.
    """
    schema = build_schema()
    if field:
        if field not in schema["properties"]:
            raise SpinError(f"--field {field}: there is no such key")
        schema = {"$defs": schema["$defs"], "properties": {field: schema["properties"][field]}}
    text = json.dumps(schema, indent=2)
    if output and not output.parent.is_dir():
        raise SpinError(f"{output}: there is no directory {output.parent}")
    if output:
        output.write_text(text + "\n", encoding="utf-8")
        say(f"{output} is written")
    else:
        click.echo(text)


def build_schema() -> dict[str, Any]:
    """The schema as a mapping."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    from spin_plugin.args import SpinArgs

    class Configuration(AxolotlInputConfig):
        """An Axolotl configuration for SPIN."""

        spin: SpinArgs | None = None

    schema = Configuration.model_json_schema(schema_generator=_Schema)
    schema["properties"]["rl"] = {
        "anyOf": [{"const": "spin"}, schema["properties"]["rl"]],
        "description": "`spin`: Self-Play Fine-Tuning, as the `spin:` block says.",
    }
    return schema
