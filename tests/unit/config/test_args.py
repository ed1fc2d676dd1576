"""The `spin:` and `vllm:` blocks: bounds, unknown keys, the schedule, and that parsing only raises SpinError."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spin_plugin.args import (
    IN_VLLM_BLOCK,
    PLUGIN_VLLM_KEYS,
    RUN_WIDE_KEYS,
    VLLM_SERVER_KEYS,
    Block,
    GenerationArgs,
    JudgeArgs,
    Mark,
    SpinArgs,
    VllmArgs,
)
from spin_plugin.config.identity import differing_keys
from spin_plugin.config.parse import parse_spin_block, parse_vllm_block
from spin_plugin.console import SpinError
from spin_plugin.objective.losses import Objective


def error_of(block: object, known: tuple[str, ...] = ()) -> str:
    """Return the one-line message with which a `spin:` block is rejected."""
    with pytest.raises(SpinError) as caught:
        parse_spin_block(block, known)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def nested(path: str, value: object) -> dict[str, Any]:
    """Return `{"a": {"b": value}}` for the path "a.b"."""
    *parents, last = path.split(".")
    block: dict[str, Any] = {last: value}
    for parent in reversed(parents):
        block = {parent: block}
    return block


def value_at(args: SpinArgs, path: str) -> Any:
    value: Any = args
    for part in path.split("."):
        value = getattr(value, part)
    return value


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("iterations", 0), ("iterations", -1), ("iterations", 101), ("iterations", 2.5), ("iterations", "many"),
        ("beta", 0), ("beta", -1), ("beta", float("nan")), ("beta", float("inf")), ("beta", "strong"), ("beta", None),
        ("loss_type", "sigmoid"), ("loss_type", "Logistic"), ("loss_type", None),
        ("space_mu", 0), ("space_mu", float("inf")), ("t_spin_weight", 0), ("t_spin_weight", "small"),
        ("real_penalty", -1), ("real_penalty", float("nan")), ("sft_weight", -0.1), ("sft_weight", "on"),
        ("history_iterations", -1), ("history_iterations", 1.5),
        ("num_prompts", 0), ("num_prompts", -5), ("num_prompts", "all"),
        ("resample_prompts", "sometimes"), ("resample_prompts", 2),
        ("turns", "second"), ("turns", 1),
        ("held_out", -0.1), ("held_out", 1), ("held_out", 4), ("held_out", float("nan")), ("held_out", None),
        ("stop", "warn"), ("stop", True), ("stop", 0), ("stop.metric", "loss"), ("stop.metric", "gsm8k/"),
        ("stop.metric", True), ("stop.patience", 0), ("keep", "newest"),
        ("equal_pairs", True), ("equal_pairs", "remove"),
        ("schedule", {"beta": 1}), ("schedule", 3), ("schedule", [1]), ("schedule", [["beta", 1]]),
        ("generation", 3), ("generation", "fast"), ("generation", []),
        ("generation.vllm_python", 3),
        ("generation.temperature", 0), ("generation.temperature", -0.1), ("generation.temperature", 2.5),
        ("generation.top_p", 0), ("generation.top_p", 1.5), ("generation.top_p", -1),
        ("generation.max_tokens", 0), ("generation.max_tokens", -1),
        ("generation.num_generations", 0), ("generation.num_generations", 65),
        ("generation.seed", -1),
        ("generation.backend", "vllm"), ("generation.vllm_kwargs", []), ("generation.vllm_kwargs", "max_num_seqs"),
    ],
)  # fmt: skip
def test_invalid_value_is_reported_with_its_key(path: str, value: object) -> None:
    assert error_of(nested(path, value)).startswith(f"spin.{path}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("iterations", 1), ("iterations", 100), ("beta", 1e-6), ("beta", 50), ("num_prompts", 1),
        ("loss_type", "hinge"), ("loss_type", "exponential"), ("loss_type", "correlation"), ("loss_type", "logistic"),
        ("loss_type", "space"), ("loss_type", "t_spin"), ("real_penalty", 0), ("real_penalty", 50), ("sft_weight", 0),
        ("sft_weight", 2), ("space_mu", 1), ("t_spin_weight", 0.1),
        ("history_iterations", 0), ("held_out", 0), ("held_out", 0.999), ("stop.metric", "auto"), ("keep", "last"),
        ("stop.metric", "gsm8k/exact_match,strict-match"), ("stop.metric", "off"), ("keep", "best"), ("keep", "all"),
        ("turns", "first"), ("turns", "last"), ("turns", "all"), ("equal_pairs", "keep"), ("resample_prompts", True),
        ("generation.temperature", 0.01), ("generation.temperature", 2), ("generation.top_p", 0.01),
        ("generation.top_p", 1), ("generation.max_tokens", 1), ("generation.num_generations", 64),
        ("generation.seed", 0), ("generation.vllm_kwargs", {"max_num_seqs": 8}), ("generation.backend", "ray"),
        ("generation.vllm_python", "/x/python"),
    ],
)  # fmt: skip
def test_value_at_its_bound_is_accepted(path: str, value: object) -> None:
    assert value_at(parse_spin_block(nested(path, value)), path) == value


@pytest.mark.parametrize("written", [False, "off", {"metric": False}, {"metric": "off"}])
def test_stop_is_switched_off(written: object) -> None:
    args = parse_spin_block({"stop": written})
    assert args.stop.metric == "off"
    assert parse_spin_block(args.model_dump(exclude_none=True)) == args


def test_schema_accepts_that_stop_is_switched_off() -> None:
    schema = SpinArgs.model_json_schema()
    assert schema["properties"]["stop"]["anyOf"] == [{"$ref": "#/$defs/StopArgs"}, {"enum": ["off", False]}]


def test_judge_as_metric_requires_a_judge() -> None:
    block = {"stop": {"metric": "judge", "patience": 2}}
    assert error_of(block) == "spin: stop.metric: judge requires `judge`; set it or use another metric"
    assert parse_spin_block(block | {"judge": {"function": "exact"}}).stop.patience == 2


def test_patience_requires_a_metric() -> None:
    for metric in ("auto", "off"):
        assert error_of({"stop": {"metric": metric, "patience": 3}}).startswith("spin.stop: patience requires a metric")


def test_several_invalid_values_are_reported_on_one_line() -> None:
    message = error_of({"beta": -1, "iterations": 0, "turns": "x"})
    assert all(name in message for name in ("spin.beta", "spin.iterations", "spin.turns"))


def test_long_value_is_shortened_in_the_message() -> None:
    assert len(error_of({"schedule": "x" * 10_000})) < 200


@pytest.mark.parametrize("block", [None, True, 3, "iterations: 3", [], [{"iterations": 3}]])
def test_block_must_be_a_mapping(block: object) -> None:
    assert error_of(block).startswith("spin: must be a mapping")


def test_defaults_are_the_papers() -> None:
    args = parse_spin_block({})
    assert (args.iterations, args.beta, args.loss_type, args.history_iterations) == (4, 0.1, "logistic", 1)
    assert (args.generation.temperature, args.generation.top_p) == (1.0, 1.0)


# --- unknown keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("betta", "beta"),
        ("iteration", "iterations"),
        ("num_prompt", "num_prompts"),
        ("equal_pair", "equal_pairs"),
        ("generation.temprature", "temperature"),
        ("generation.max_token", "max_tokens"),
        ("generation.vllm_kwarg", "vllm_kwargs"),
    ],
)
def test_unknown_key_suggests_the_nearest_known_one(path: str, nearest: str) -> None:
    assert error_of(nested(path, 1)) == f"spin.{path}: unknown key; did you mean `{nearest}`?"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("max_tokens", "in `spin.generation`: write `generation: {max_tokens: …}`"),
        ("temperature", "in `spin.generation`: write `generation: {temperature: …}`"),
        ("generation.beta", "directly in `spin:`, beside `generation`"),
    ],
)
def test_misplaced_key_is_reported_with_its_place(path: str, place: str) -> None:
    assert error_of(nested(path, 1)) == f"spin.{path}: unknown key; it belongs {place}"


def test_misplaced_generation_key_in_the_schedule_is_reported_with_its_place() -> None:
    error = error_of({"iterations": 1, "schedule": [{"max_tokens": 3}]}, ("max_steps",))
    assert error.startswith("spin.schedule[0].max_tokens: ")
    assert error.endswith("write `generation: {max_tokens: …}`")


@pytest.mark.parametrize(("path", "fields"), [("zzz", SpinArgs), ("generation.zzz", GenerationArgs)])
def test_unknown_key_without_a_similar_one_lists_all_keys(path: str, fields: type[Block]) -> None:
    message = error_of(nested(path, 1))
    assert message.startswith(f"spin.{path}: unknown key; known keys: ")
    assert message.rpartition(": ")[2].split(", ") == sorted(fields.model_fields)


def test_key_that_is_not_a_string() -> None:
    assert error_of({1: 2}).startswith("spin.1: ")


@pytest.mark.parametrize("key", sorted(PLUGIN_VLLM_KEYS))
def test_vllm_argument_set_by_the_plugin_is_rejected(key: str) -> None:
    assert f"vllm_kwargs.{key}: set by the plugin" in error_of({"generation": {"vllm_kwargs": {key: 1}}})


def test_token_in_the_configuration_is_rejected() -> None:
    """Axolotl logs the configuration."""
    message = error_of({"generation": {"vllm_kwargs": {"hf_token": "hf_secret"}}})
    assert "HF_TOKEN" in message
    assert "secret" not in message


@pytest.mark.parametrize("key", sorted(IN_VLLM_BLOCK))
def test_vllm_argument_with_a_key_in_the_vllm_block_is_rejected(key: str) -> None:
    assert f"`vllm: {{{key}: …}}`" in error_of({"generation": {"vllm_kwargs": {key: 1}}})
    assert f"`vllm: {{{key}: …}}` beside `spin`" in error_of({"generation": {key: 1}})
    assert key in VllmArgs.model_fields


# --- Axolotl's `vllm:` block -------------------------------------------------------------------


def vllm_error_of(block: object) -> str:
    with pytest.raises(SpinError) as caught:
        parse_vllm_block(block)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_parallel_size", 0), ("data_parallel_size", 0), ("data_parallel_size", 1025),
        ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.01), ("dtype", "int8"), ("dtype", "bf16"),
        ("max_model_len", 1), ("enforce_eager", "perhaps"), ("enable_prefix_caching", 7),
    ],
)  # fmt: skip
def test_invalid_value_in_the_vllm_block_is_reported(key: str, value: object) -> None:
    assert vllm_error_of({key: value}).startswith(f"vllm.{key}: ")


def test_unknown_key_in_the_vllm_block_is_reported_with_its_place() -> None:
    assert "vllm.tensor_parallel_sise: unknown key; did you mean `tensor_parallel_size`?" in vllm_error_of(
        {"tensor_parallel_sise": 2}
    )
    assert "spin.generation.vllm_kwargs" in vllm_error_of({"max_num_seqs": 8})
    assert "must be a mapping" in vllm_error_of([1])


def test_server_keys_of_a_grpo_configuration_are_ignored() -> None:
    block = {"host": "0.0.0.0", "port": 8000, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.85,
             "dtype": "auto", "serve_module": "axolotl.scripts.vllm_serve_lora", "max_model_len": None}  # fmt: skip
    args, unused = parse_vllm_block(block)
    assert args.model_dump(exclude_unset=True) == {
        "tensor_parallel_size": 2, "gpu_memory_utilization": 0.85, "dtype": "auto",
    }  # fmt: skip
    assert unused == ("host", "port", "serve_module")


def test_every_key_of_axolotls_vllm_block_is_either_used_or_a_server_key() -> None:
    from axolotl.utils.schemas.vllm import VllmConfig

    assert VllmConfig.model_fields.keys() == VllmArgs.model_fields.keys() | VLLM_SERVER_KEYS
    assert VllmArgs.model_fields.keys() == IN_VLLM_BLOCK


@pytest.mark.parametrize(("value", "expected"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off")])
def test_on_and_off_may_be_booleans(value: object, expected: str) -> None:
    """YAML reads them as such unless they are quoted."""
    assert parse_spin_block({"shared_prefix": value}).shared_prefix == expected


def test_pairs_are_grouped_unless_switched_off() -> None:
    assert parse_spin_block({}).group_prompts == "auto"
    assert parse_spin_block({"group_prompts": False}).group_prompts == "off"
    assert "spin.group_prompts: input should be 'auto' or 'off'" in error_of({"group_prompts": True})


def test_ray_address_without_ray_is_rejected() -> None:
    assert "ray_address requires `backend: ray`" in error_of({"generation": {"ray_address": "auto"}})
    assert parse_spin_block({"generation": {"backend": "ray", "ray_address": "auto"}}).generation.backend == "ray"


def test_other_vllm_arguments_are_passed_unchanged() -> None:
    args = parse_spin_block({"generation": {"vllm_kwargs": {"max_num_seqs": 8, "swap_space": 1}}})
    assert args.generation.vllm_kwargs == {"max_num_seqs": 8, "swap_space": 1}


# --- schedule ----------------------------------------------------------------------------------

AXOLOTL_KEYS = ("learning_rate", "num_epochs", "base_model", "micro_batch_size")


@pytest.mark.parametrize("entries", [1, 3])
def test_schedule_must_have_one_entry_per_iteration(entries: int) -> None:
    assert f"schedule has {entries} entries for 2 iterations" in error_of(
        {"iterations": 2, "schedule": [{"beta": 1}] * entries}
    )


@pytest.mark.parametrize("key", sorted(RUN_WIDE_KEYS | SpinArgs.marked(Mark.RUN_WIDE)))
def test_schedule_cannot_change_a_run_wide_key(key: str) -> None:
    assert f"schedule[1].{key} cannot change between iterations" in error_of(
        {"iterations": 2, "schedule": [{}, {key: 1}]}
    )


def test_schedule_cannot_change_turns() -> None:
    """Prompts are extracted once per run, so a later change of `turns` would silently be ignored."""
    assert "schedule[1].turns cannot change between iterations" in error_of(
        {"iterations": 2, "schedule": [{}, {"turns": "last"}]}
    )


def test_spin_keys_of_the_schedule_are_merged() -> None:
    args = parse_spin_block({"iterations": 2, "beta": 0.2, "history_iterations": 0, "schedule": [{}, {"beta": 5.0}]})
    assert (args.at(0).beta, args.at(0).history_iterations) == (0.2, 0)
    assert (args.at(1).beta, args.at(1).history_iterations) == (5.0, 0)
    assert args.at(1).iterations == 2


def test_nested_generation_keys_of_the_schedule_are_merged() -> None:
    args = parse_spin_block(
        {
            "iterations": 2,
            "generation": {"max_tokens": 8, "top_p": 0.9},
            "schedule": [{"generation": {"top_p": 0.5}}, {"generation": {"num_generations": 2}}],
        }
    )
    first, second = args.at(0).generation, args.at(1).generation
    assert (first.max_tokens, first.top_p, first.num_generations) == (8, 0.5, 1)
    assert (second.max_tokens, second.top_p, second.num_generations) == (8, 0.9, 2)


@pytest.mark.parametrize(("option", "loss"), [("space_mu", "space"), ("t_spin_weight", "t_spin")])
def test_option_of_a_loss_that_no_iteration_uses_is_refused(option: str, loss: str) -> None:
    message = f"{option} requires `loss_type: {loss}`; set it or remove {option}"
    assert message in error_of({option: 2})
    assert message in error_of({option: 2, "iterations": 2, "schedule": [{"loss_type": "hinge"}, {}]})
    assert f"spin.schedule[0]: {message}" in error_of({"iterations": 2, "schedule": [{option: 2}, {"loss_type": loss}]})
    assert parse_spin_block({option: 2, "loss_type": loss}).at(3).objective._asdict()[option] == 2


def test_scheduled_loss_has_its_options() -> None:
    """Where another loss is scheduled, they are not used."""
    schedule = [{}, {"loss_type": "space"}, {"loss_type": "space", "space_mu": 7, "sft_weight": 0.5}]
    args = parse_spin_block({"iterations": 3, "space_mu": 2, "real_penalty": 3, "schedule": schedule})
    found = [args.at(number).objective for number in range(3)]
    assert found == [
        Objective("logistic", real_penalty=3),
        Objective("space", space_mu=2, real_penalty=3),
        Objective("space", space_mu=7, real_penalty=3, sft_weight=0.5),
    ]


def test_without_a_schedule_all_iterations_are_the_same() -> None:
    args = parse_spin_block({"iterations": 3})
    assert args.at(2) is args
    assert args.axolotl_overrides(2) == {}


def test_axolotl_keys_of_the_schedule_are_separated() -> None:
    schedule = [{"learning_rate": 5e-7, "beta": 1.0}, {"learning_rate": 1e-7, "generation": {"top_p": 0.5}}]
    args = parse_spin_block({"iterations": 2, "schedule": schedule}, AXOLOTL_KEYS)
    assert args.axolotl_overrides(0) == {"learning_rate": 5e-7}
    assert args.axolotl_overrides(1) == {"learning_rate": 1e-7}


def test_unknown_key_in_the_schedule_suggests_the_nearest_known_one() -> None:
    message = error_of({"iterations": 1, "schedule": [{"learning_rat": 1e-7}]}, AXOLOTL_KEYS)
    assert message == "spin.schedule[0].learning_rat: unknown key; did you mean `learning_rate`?"
    assert "did you mean `beta`" in error_of({"iterations": 1, "schedule": [{"betta": 1}]}, AXOLOTL_KEYS)


@pytest.mark.parametrize(
    ("entry", "named"),
    [({"beta": -1}, "schedule[1].beta"), ({"generation": {"top_p": 3}}, "schedule[1].generation.top_p")],
)
def test_invalid_value_in_the_schedule_is_reported_with_its_path(entry: dict[str, Any], named: str) -> None:
    assert error_of({"iterations": 2, "schedule": [{}, entry]}).startswith(f"spin.{named}: ")


def test_unknown_generation_key_in_the_schedule_is_reported_with_its_path() -> None:
    message = error_of({"iterations": 1, "schedule": [{"generation": {"temprature": 1}}]})
    assert message == "spin.schedule[0].generation.temprature: unknown key; did you mean `temperature`?"


# --- the classes themselves --------------------------------------------------------------------


def fields() -> Iterator[tuple[str, Any]]:
    for block in (SpinArgs, GenerationArgs, JudgeArgs):
        for name, field in block.model_fields.items():
            yield f"{block.__name__}.{name}", field


@pytest.mark.parametrize(("name", "field"), list(fields()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_has_a_description_and_a_default(name: str, field: Any) -> None:
    assert field.description, f"{name} has no docstring"
    assert field.description.rstrip().endswith(".")
    assert field.is_required() == (name == "JudgeArgs.function")


def test_no_option_shares_its_name_with_an_axolotl_key() -> None:
    """`schedule` accepts both kinds of keys, so a shared name would be ambiguous."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    assert not SpinArgs.model_fields.keys() & (AxolotlInputConfig.model_fields.keys() - {"spin"})


# --- the judge ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "function"),
    [("exact", "spin_plugin.judge:exact"), ("mine:judge", "mine:judge"), ("a.b:c", "a.b:c")],
)
def test_judge_is_a_ready_made_one_or_a_function(written: str, function: str) -> None:
    judge = parse_spin_block({"judge": {"function": written}}).judge
    assert judge == JudgeArgs(function=function, drop_at=1.0, timeout=10.0, processes=2, kwargs={})


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({}, "spin.judge.function: field required"),
        (
            {"function": "exactly"},
            "spin.judge.function: 'exactly' is neither `module:function` nor one of exact",
        ),
        ({"function": "a:b:c"}, "spin.judge.function"),
        ({"function": "a/b.py:c"}, "spin.judge.function"),
        ({"function": "mine.py:judge"}, "write `module:function` instead of 'mine.py:judge': a module's name, not its"),
        ({"function": "exact", "processes": 17}, "spin.judge.processes"),
        ({"function": ":c"}, "spin.judge.function"),
        ({"function": "a:"}, "spin.judge.function"),
        ({"function": "exact", "drop_at": 0}, "spin.judge.drop_at"),
        ({"function": "exact", "drop_at": 1.1}, "spin.judge.drop_at"),
        ({"function": "exact", "timeout": 0}, "spin.judge.timeout"),
        ({"function": "exact", "processes": 0}, "spin.judge.processes"),
        ({"function": "exact", "kwargs": {"real": 1}}, "spin.judge.kwargs: real is passed by the plugin"),
        ({"function": "exact", "kwargs": {"x": object()}}, "spin.judge.kwargs"),
        ({"function": "exact", "drop": 1}, "spin.judge.drop: unknown key; did you mean `drop_at`?"),
        ("exact", "spin.judge: "),
    ],
)
def test_invalid_judge_is_reported(judge: object, message: str) -> None:
    assert message in error_of({"judge": judge})


def test_misplaced_judge_key_is_reported_with_its_place() -> None:
    assert "it belongs in `spin.judge`: write `judge: {drop_at: …}`" in error_of({"drop_at": 0.5})


def test_schedule_adds_changes_and_removes_the_judge() -> None:
    schedule = [{}, {"judge": {"function": "exact"}}, {"judge": {"function": "exact", "drop_at": 0.5}}]
    args = parse_spin_block({"iterations": 3, "schedule": schedule})
    assert [args.at(number).judge for number in range(3)] == [
        None,
        JudgeArgs(function="exact"),
        JudgeArgs(function="exact", drop_at=0.5),
    ]
    args = parse_spin_block(
        {
            "iterations": 2,
            "judge": {"function": "number", "timeout": 3, "kwargs": {"tolerance": 1}},
            "schedule": [{"judge": {"drop_at": 0.5}}, {"judge": None}],
        }
    )
    assert args.at(0).judge == JudgeArgs(function="number", drop_at=0.5, timeout=3, kwargs={"tolerance": 1})
    assert args.at(1).judge is None


def test_another_function_in_the_schedule_does_not_inherit_kwargs() -> None:
    args = parse_spin_block(
        {
            "iterations": 4,
            "judge": {"function": "number", "timeout": 3, "kwargs": {"tolerance": 1}},
            "schedule": [
                {"judge": {"function": "number"}},
                {"judge": {"function": "exact"}},
                {"judge": {"function": "exact", "kwargs": {"ignore_case": True}}},
                {"judge": {"function": "exact", "drop_at": 0.5}},
            ],
        }
    )
    found = [args.at(number).judge for number in range(4)]
    assert [judge and judge.kwargs for judge in found] == [{"tolerance": 1}, {}, {"ignore_case": True}, {}]
    assert [judge and judge.timeout for judge in found] == [3, 3, 3, 3]
    assert args.judges == [found[0], found[3], found[2]]  # each function with its arguments once


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"timeout": 60, "processes": 8}, []),
        ({"drop_at": 0.5}, ["spin.judge.drop_at"]),
        ({"function": "number"}, ["spin.judge.function"]),
        ({"kwargs": {"ignore_case": True}}, ["spin.judge.kwargs"]),
    ],
)
def test_only_time_limit_and_processes_may_change_on_resume(change: dict[str, Any], keys: list[str]) -> None:
    judge = {"function": "exact"}
    before, now = ({"spin": {"judge": block}} for block in (judge, judge | change))
    assert differing_keys(before, now, 0) == keys
    assert differing_keys({"spin": {}}, {"spin": {"judge": judge}}, 0) == ["spin.judge.function"]


# --- random blocks -----------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.sampled_from(["logistic", "all", "drop", "x", ""])
)
KEYS = st.sampled_from(
    [*SpinArgs.model_fields, *GenerationArgs.model_fields, *JudgeArgs.model_fields, "betta", "learning_rate", ""]
)
LEAVES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(KEYS, SCALARS, max_size=3))
VALUES = st.one_of(LEAVES, st.dictionaries(KEYS, LEAVES, max_size=3), st.lists(st.dictionaries(KEYS, LEAVES)))
ENTRIES = st.dictionaries(
    st.sampled_from(["beta", "history_iterations", "learning_rate", "generation", "judge", "turns"]), LEAVES, max_size=2
)
NEARLY_RIGHT = st.fixed_dictionaries(
    {"iterations": st.sampled_from([1, 2])},
    optional={
        "beta": st.floats(0.0, 10.0),
        "schedule": st.lists(ENTRIES, min_size=1, max_size=2),
        "generation": st.dictionaries(st.sampled_from(list(GenerationArgs.model_fields)), LEAVES, max_size=2),
        "judge": st.fixed_dictionaries(
            {"function": st.sampled_from(["exact", "a:b", "a.b", "", None])},
            optional={"drop_at": LEAVES, "timeout": LEAVES, "kwargs": LEAVES},
        ),
    },
)
BLOCKS = st.one_of(
    NEARLY_RIGHT, st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(st.integers(), SCALARS), VALUES
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(block=BLOCKS, known=st.sampled_from([(), AXOLOTL_KEYS]))
def test_any_block_is_parsed_or_rejected_with_one_line(block: object, known: tuple[str, ...]) -> None:
    try:
        args = parse_spin_block(block, known)
    except SpinError as error:
        assert re.fullmatch(r"[^\r\n]+", str(error))
    else:
        for iteration in range(args.iterations):
            assert args.at(iteration).iterations == args.iterations
            assert not args.axolotl_overrides(iteration).keys() & SpinArgs.model_fields.keys()
