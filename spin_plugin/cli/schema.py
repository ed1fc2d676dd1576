"""`axolotl spin config-schema`: Axolotl's JSON schema extended by SPIN's keys, for completion in editors."""

import json
from pathlib import Path
from typing import Any

import click
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, JsonSchemaWarningKind
from pydantic_core import PydanticSerializationError, core_schema

from spin_plugin.console import SpinError, exit_on_error, say


class _Schema(GenerateJsonSchema):
    """Omits the types (such as torch's dtype) and defaults of Axolotl that have no JSON schema."""

    def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
        return {}

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:
            return {}

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """Ignore warnings, which the user cannot act on."""


@click.command("config-schema")
@click.option("--field", help="Print the schema of this key only.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the schema to a file.")
@exit_on_error
def config_schema(field: str | None, output: Path | None) -> None:
    """Print the JSON schema of a SPIN configuration: Axolotl's keys, `rl: spin` and the `spin:` block.

    Use --output rather than redirection, because Axolotl prints a banner first.
    """
    schema = build_schema()
    if field:
        if field not in schema["properties"]:
            raise SpinError(f"--field {field}: unknown key; run the command without --field to see all keys")
        schema = {"$defs": schema["$defs"], "properties": {field: schema["properties"][field]}}
    text = json.dumps(schema, indent=2)
    if output and not output.parent.is_dir():
        raise SpinError(f"{output}: directory {output.parent} does not exist; create it")
    if output:
        output.write_text(text + "\n", encoding="utf-8")
        say(f"wrote {output}")
    else:
        click.echo(text)


def build_schema() -> dict[str, Any]:
    """Build the schema as a mapping."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    from spin_plugin.args import SpinArgs

    class Configuration(AxolotlInputConfig):
        """An Axolotl configuration for SPIN."""

        spin: SpinArgs | None = None

    schema = Configuration.model_json_schema(schema_generator=_Schema)
    schema["properties"]["rl"] = {
        "anyOf": [{"const": "spin"}, schema["properties"]["rl"]],
        "description": "`spin`: Self-Play Fine-Tuning, configured by the `spin:` block.",
    }
    return schema
