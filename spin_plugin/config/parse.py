"""Parse the `spin:` and `vllm:` blocks into typed objects, with one-line error messages that name the key."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from spin_plugin.args import VLLM_SERVER_KEYS, Block, GenerationArgs, JudgeArgs, SpinArgs, StopArgs, VllmArgs
from spin_plugin.console import SpinError


def parse_spin_block(block: object, known_axolotl_keys: Iterable[str] = ()) -> SpinArgs:
    """Parse the `spin:` block.

    Args:
        block: the value of `spin:` in the YAML.
        known_axolotl_keys: Axolotl keys allowed in `schedule`; if empty, its Axolotl keys are not checked.

    Raises:
        SpinError: a key is unknown or its value invalid; the message lists every such key.
    """
    if not isinstance(block, Mapping):
        raise SpinError("spin: must be a mapping, for example `spin: {iterations: 3}`")
    try:
        args = SpinArgs.model_validate(dict(block))
    except ValidationError as error:
        raise SpinError(_describe_all(error)) from None
    known = set(known_axolotl_keys)
    for number, entry in enumerate(args.schedule):
        try:
            args.at(number)
        except ValidationError as error:
            raise SpinError(_describe_all(error, f"schedule[{number}]")) from None
        unknown = sorted(entry.keys() - known - SpinArgs.model_fields.keys()) if known else []
        if unknown:
            raise SpinError(_unknown_key(f"spin.schedule[{number}]", unknown[0], known | SpinArgs.model_fields.keys()))
    return args


def parse_vllm_block(block: object) -> tuple[VllmArgs, tuple[str, ...]]:
    """Parse Axolotl's `vllm:` block.

    Returns:
        the options that SPIN uses, and the names of the server keys in the block.

    Raises:
        SpinError: a key is unknown or its value invalid.
    """
    if not isinstance(block, Mapping):
        raise SpinError("vllm: must be a mapping, for example `vllm: {tensor_parallel_size: 2}`")
    used = {key: value for key, value in block.items() if key not in VLLM_SERVER_KEYS and value is not None}
    for key in sorted(map(str, used.keys() - VllmArgs.model_fields.keys())):
        raise SpinError(
            f"{_unknown_key('vllm', key, VllmArgs.model_fields)}; other arguments of vLLM's `LLM` belong in "
            "spin.generation.vllm_kwargs"
        )
    try:
        args = VllmArgs.model_validate(used)
    except ValidationError as error:
        raise SpinError("; ".join(_describe(detail, "vllm") for detail in error.errors())) from None
    return args, tuple(sorted(key for key in block if key in VLLM_SERVER_KEYS))


def _describe_all(error: ValidationError, place: str = "") -> str:
    """Describe all invalid values on one line."""
    parent = f"spin.{place}" if place else "spin"
    return "; ".join(_describe(detail, parent) for detail in error.errors())


def _describe(detail: ErrorDetails, parent: str) -> str:
    """Describe one invalid value."""
    path = [str(part) for part in detail["loc"]]
    name = ".".join([parent, *path])
    if detail["type"] == "extra_forbidden":
        blocks: dict[str, type[Block]] = {"generation": GenerationArgs, "judge": JudgeArgs, "stop": StopArgs}
        fields = blocks.get(path[0], SpinArgs).model_fields
        return _unknown_key(".".join([parent, *path[:-1]]), path[-1], fields)
    message = detail["msg"].removeprefix("Value error, ")
    if not path or detail["type"] == "value_error":
        return f"{name}: {message}"
    value = repr(detail["input"])
    return f"{name}: {message[0].lower()}{message[1:]} (got {value if len(value) <= 60 else value[:60] + '…'})"


def _unknown_key(parent: str, key: str, known: Iterable[str]) -> str:
    known = set(known)
    for fields, place in (
        (SpinArgs.model_fields, "directly in `spin:`, beside `generation`"),
        (GenerationArgs.model_fields, f"in `spin.generation`: write `generation: {{{key}: …}}`"),
        (JudgeArgs.model_fields, f"in `spin.judge`: write `judge: {{{key}: …}}`"),
        (StopArgs.model_fields, f"in `spin.stop`: write `stop: {{{key}: …}}`"),
        (VllmArgs.model_fields, f"in Axolotl's `vllm:` block: write `vllm: {{{key}: …}}` beside `spin`"),
    ):
        if key in fields and key not in known:
            return f"{parent}.{key}: unknown key; it belongs {place}"
    near = get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{parent}.{key}: unknown key; {hint}"
