"""The model card of an iteration: what it is, the table of its run, settings and citation."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spin_plugin.args import SpinArgs
from spin_plugin.export.base import data_names, read_base, shown
from spin_plugin.objective.decline import read_check
from spin_plugin.run.overview import newest_stats
from spin_plugin.run.scores import shown_scores
from spin_plugin.run.state import RunState

# The keys that determine a result; `spin:` is shown beside them.
SETTINGS = (
    "sequence_len", "adapter", "lora_r", "lora_alpha", "learning_rate", "lr_scheduler", "warmup_ratio", "warmup_steps",
    "optimizer", "weight_decay", "num_epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps", "bf16",
    "fp16", "load_in_4bit", "load_in_8bit", "seed",
)  # fmt: skip
# Options of nested blocks that name files, or this machine, and not what was done.
LEFT_OUT = {"generation": ("vllm_python", "backend", "ray_address", "vllm_kwargs"), "judge": ("kwargs", "processes")}
CITATION = """@inproceedings{chen2024spin,
  title     = {Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models},
  author    = {Chen, Zixiang and Deng, Yihe and Yuan, Huizhuo and Ji, Kaixuan and Gu, Quanquan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.01335}
}"""


def model_card(state: RunState, number: int, *, adapter: bool) -> str:
    """Return the card of an iteration's model, with its front matter.

    Args:
        state: the run, with this iteration among its finished ones.
        number: the iteration.
        adapter: whether the model is an adapter, to be loaded with its base.
    """
    from huggingface_hub import ModelCardData

    config = state.config
    base = read_base(config)
    datasets = data_names(config)
    data = ModelCardData(
        base_model=base.on_hub,
        datasets=[name for name, on_hub in datasets.items() if on_hub] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["spin", "self-play", "axolotl", *(["lora"] if adapter else [])],
        base_model_relation=("adapter" if adapter else "finetune") if base.on_hub else None,
        **base.license,
    )
    name = f"{Path(config['output_dir']).resolve().name}, iteration {number}"
    origin = f"[{base.name}](https://huggingface.co/{base.name})" if base.name == base.on_hub else f"`{base.name}`"
    if start := config.get("lora_model_dir"):
        origin += f" with the adapter `{shown(str(start))}`"
    trained = "An adapter for" if adapter else "A fine-tune of"
    data_named = " and ".join(f"`{name}`" for name in datasets)
    return f"""---
{data.to_yaml().strip()}
---

# {name}

{trained} {origin}, trained on {data_named} by Self-Play Fine-Tuning ([SPIN](https://arxiv.org/abs/2401.01335)): in each
iteration the model learns to prefer the real responses of its SFT data to those that it generates itself.

## The run

{_table(state.finished, number)}

Real, synthetic: mean tokens per response. Margin, accuracy: of the pairs in the last epoch. Held-out: mean log-prob of
real responses to held-out prompts, in nats per token. These numbers relate the model to its training data; they do
not say how good its answers are.

## Settings

```yaml
{yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True).strip()}
```

## Citation

Trained with spin-plugin {state.version} for [Axolotl](https://github.com/axolotl-ai-cloud/axolotl).

```bibtex
{CITATION}
```
"""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that determine a result, and the `spin:` block."""
    spin = _spin_settings(config.get("spin") or {})
    if schedule := spin.pop("schedule", None):
        spin["schedule"] = [_spin_settings(entry) | _only(SETTINGS, entry) for entry in schedule]
    return {"spin": spin} | _only(SETTINGS, config)


def _spin_settings(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a `spin:` block, or an entry of its schedule, that say what was done."""
    spin = _only(SpinArgs.model_fields, block)
    for name, left_out in LEFT_OUT.items():
        if isinstance(nested := spin.get(name), Mapping):
            spin[name] = {option: value for option, value in nested.items() if option not in left_out}
    return {name: value for name, value in spin.items() if value not in ({}, [])}


def _only(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _table(entries: Sequence[Mapping[str, Any]], number: int) -> str:
    """Return the iterations as a Markdown table; columns without a value are left out."""
    rows = [_row(entry) for entry in entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if entries and (held_out := read_check(entries[0], "held_out")):
        rows.insert(0, {"iteration": "start", "held-out": f"{held_out.before:.4f}"})
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if row["iteration"] == str(number) else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return an iteration's cells by column."""
    row = {"iteration": str(entry["iteration"])}
    if pairs := entry["pairs"].get("train"):
        row |= {"pairs": f"{pairs['pairs']:,}"}
        own = newest_stats(entry)
        row |= {side: f"{own[f'{side}_mean']:.1f}" for side in ("real", "synthetic") if f"{side}_mean" in own}
    metrics = {"margin": "spin/reward_margin", "accuracy": "spin/accuracy"}
    row |= {name: f"{entry['metrics'][key]:.4f}" for name, key in metrics.items() if key in entry["metrics"]}
    for column, name in (("held-out", "held_out"), ("judge", "judge")):
        if check := read_check(entry, name):
            row[column] = f"{check.after:.4f}"
    return row | shown_scores(entry.get("lm_eval") or {})
