"""Generate docs/troubleshooting.md: every error and warning in the code, and what its text cannot say (NOTES).

python scripts/make_troubleshooting.py           # write
python scripts/make_troubleshooting.py --check   # exit 1 if the file is outdated
"""

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spin_plugin.console import DISK_ERRORS, ERROR, WARNING
from spin_plugin.generation.diagnosis import ADVICE

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "troubleshooting.md"
UNKNOWN = "…"
LETTERS = re.compile(r"[A-Za-z_]{2,}")
HEAD = f"""# Troubleshooting by message

Every line that begins with `{ERROR.strip()}` or `{WARNING.strip()}`, by stage and then by alphabet; {UNKNOWN}
stands for names and numbers. A message says what to do; below some is what else there is to know. Search for a few
words of yours. [Faults](faults.md) says what happens when a process is killed or a file is lost.

Generated from the messages in the code by `scripts/make_troubleshooting.py`, which also holds the notes; do not edit.

## No message of ours

- **The first loss is not ln 2 = 0.6931** with `loss_type: logistic` and no additions: the policy is not the opponent.
  Stop the run and open an issue. In 16 bits on a GPU a small difference is [rounding](gpu.md).
- **Axolotl says `Input should be 'dpo', {UNKNOWN}` about `rl`**: the plugin is not loaded. Below Axolotl 0.21 add
  `plugins: [spin_plugin.SpinPlugin]`; from 0.21 on, install spin-plugin into the environment of this `axolotl`.
- **Out of memory in training**: set `tokens_per_micro_batch`, or a smaller `micro_batch_size` with proportionally more
  `gradient_accumulation_steps`; then `gradient_checkpointing`, `deepspeed` or `fsdp_config`. Later iterations need more
  than the first, because [prompts have more pairs](guide.md#what-an-iteration-costs).
- **Out of memory in vLLM**: besides the keys that [its message](#vllm) names, set
  `vllm: {{tensor_parallel_size: {UNKNOWN}}}` or `generation: {{vllm_kwargs: {{max_num_seqs: {UNKNOWN}}}}}`.
- **The loss falls, but the model does not improve**: [what to watch](guide.md#what-to-watch), and
  [whether SPIN is what you need](../README.md#is-spin-what-you-need).
"""
# Stages in their order, and the modules whose messages belong to each; the longest matching path counts.
STAGES: dict[str, tuple[str, ...]] = {
    "Commands": ("cli/", "doctor/", "report/", "export/"),
    "Configuration": ("args/", "config/", "plugin.py", "versions.py", "training/precision.py"),
    "Data and pairs": ("data/", "training/loading.py", "training/prepare.py"),
    "vLLM": ("generation/", "cli/setup.py", "training/generate.py"),
    "A judge": ("judge/", "training/judged.py"),
    "Weights": ("opponent/", "run/checkpoint.py"),
    "Checks before the first step": (
        "model/",
        "opponent/agreement.py",
        "opponent/scoring.py",
        "training/scorer.py",
    ),
    "Training": ("training/", "objective/"),
    "The run and its directory": ("run/", "training/iteration.py"),
    "Several processes": ("run/processes.py",),
    "Everything else": ("",),
}
# What a message cannot say, by a part of it. Markdown.
NOTES = {
    "does not load the plugin; add": "Only Axolotl below 0.21 needs this: newer versions find an installed plugin.",
    "is missing although": "Without `rl: spin` the run would be ordinary SFT on the same data.",
    "unknown key; …": "[reference.md](reference.md) lists every key; editors can check the file "
    "([FAQ](faq.md#where-are-the-keys-documented)).",
    "is high for SPIN": "The limits are for models of billions of parameters: the tiny run trains at ten "
    "times its limit and gains ([what to set](guide.md#what-to-set)).",
    "real responses end in an end token": "The generated responses end where the real ones do. If SFT did not train on "
    "the end token, the SFT model does not stop either: train it again.",
    "is outside the vocabulary of base_model": "`tokens` or `special_tokens` that SFT did not have.",
    "no example fits in sequence_len": "An example counts with its prompt. Long examples are dropped, never truncated.",
    "no pairs left to train on": "If most responses equal the real ones, the game is over: the opponent reproduces the "
    "data.",
    "finished shards are kept, rerun": "The cause is the first part of the line, from vLLM's log in "
    "`iteration-t/synthetic`; the table below has vLLM's own words.",
    "vLLM was not found": "[Environments](faq.md#environments) says which machine needs a second environment.",
    "more than the … that rounding explains": "If you find none, open an issue with the configuration.",
    "cannot be trained on pairs": "Neither shared-prefix rows nor padded ones give the values of single sequences, "
    "mostly because attention depends on the whole sequence.",
    "holds NaN or infinite numbers": "vLLM would generate garbage from it without a word.",
    "tensors of the architecture are missing": "vLLM would initialize them at random without a word.",
    "so iteration … is not trained": "[Did an iteration make the model worse?](guide.md#did-an-iteration-make-the-"
    "model-worse) says how this is measured, and what to try.",
    "the mean of spin/reward_real": "The commonest complaint about SPIN; [losses](guide.md#losses) compares "
    "the remedies.",
    "of the iteration are warm-up": "Optimizer and schedule start anew in each iteration, so `warmup_steps` of a "
    "long SFT run are too many.",
    "belongs to a run with another configuration": "Keys that cannot affect the result may change; the "
    "[reference](reference.md) says which.",
    "is in use by": "The pid and host are those of the other command. After SIGKILL of `axolotl spin train`, its "
    "iteration goes on to the end.",
    "rendezvous of the ranks failed": "A machine is lost, or `output_dir` is not on a file system that all share.",
    "other ranks saved within": "The same causes, or a file system that is too slow for checkpoints of this size.",
}


@dataclass(frozen=True)
class Message:
    """An error or warning; unknown parts are `…`."""

    module: str
    text: str
    warning: bool


def messages() -> list[Message]:
    """Return all messages of the package, without those that are no text of their own."""
    package = ROOT / "spin_plugin"
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    constants = {name: value for tree in trees.values() for name, value in _texts(tree).items() if name.isupper()}
    found = {
        Message(path.relative_to(package).as_posix(), text, warning)
        for path, tree in trees.items()
        for text, warning in _said(tree, constants, fields=path.parent.name == "args")
        if len(LETTERS.findall(text)) >= 2
    }
    return sorted(found, key=lambda message: (message.text.strip(f"{UNKNOWN} :.`-").lower(), message.module))


def _said(tree: ast.Module, constants: Mapping[str, ast.expr], *, fields: bool) -> Iterator[tuple[str, bool]]:
    """Yield the messages of a module, and whether each is a warning.

    Args:
        tree: the module.
        constants: texts that other modules import.
        fields: its ValueErrors are messages, too, because pydantic's are reported as such.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = {**constants, **_texts(tree), **_texts(scope)}
        for node in ast.walk(scope):
            match node:
                case ast.Call(func=ast.Name(id="SpinError" | "warn" | "ValueError" as kind), args=[said, *_]):
                    if kind == "ValueError" and not fields:
                        continue
                    yield from ((_render(text, names), kind == "warn") for text in _returned(said, functions) or [said])
                case ast.Call(func=ast.Name(id="Finding"), args=[_, said, advice]):
                    yield f"{_render(said, names)}; {_render(advice, names)}", True
                case ast.Call(func=ast.Name(id="Stop"), args=[said, *_]):
                    yield _render(said, names), False


def _texts(scope: ast.Module | ast.FunctionDef) -> dict[str, ast.expr]:
    """Return the names to which a scope assigns a text once."""
    assigned = [
        (target.id, node.value)
        for node in (scope.body if isinstance(scope, ast.Module) else ast.walk(scope))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    names = [name for name, _ in assigned]
    return {name: value for name, value in assigned if names.count(name) == 1 and _is_text(value)}


def _returned(node: ast.expr, functions: Mapping[str, ast.FunctionDef]) -> list[ast.expr]:
    """Return the texts that a called function of the module may return."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions):
        return []
    returns = [part.value for part in ast.walk(functions[node.func.id]) if isinstance(part, ast.Return)]
    return [value for value in returns if value is not None and _is_text(value)]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _render(node: ast.expr, names: Mapping[str, ast.expr]) -> str:
    """Return a text as the user sees it, with `…` for what is only known when it is said."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_render(part, names) for part in parts)
        case ast.FormattedValue(value=value):
            return _render(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _is_text(node):
            return _render(left, names) + _render(right, names)
        case ast.Name(id=name) if name in names:
            return _render(names[name], {other: value for other, value in names.items() if other != name})
    return UNKNOWN


def page() -> str:
    """Return the text of docs/troubleshooting.md.

    Raises:
        ValueError: a note belongs to no message.
    """
    found = messages()
    stale = [part for part in NOTES if not any(part in message.text for message in found)]
    if stale:
        raise ValueError(f"NOTES: no message contains {stale}")
    sections = [HEAD.rstrip()]
    for stage in STAGES:
        lines = list(dict.fromkeys(_entry(message) for message in found if stage_of(message.module) == stage))
        if stage == "The run and its directory":
            lines += [_quoted(f"{UNKNOWN}: {os.strerror(code)}; {way_out}") for code, way_out in DISK_ERRORS.items()]
        if lines:
            sections += [f"## {stage}", "\n".join(lines)]
        if stage == "vLLM":
            rows = [f"| `{said}` | {advice} |" for said, advice in ADVICE.items()]
            sections.append("\n".join(["| vLLM's log says | advice in our message |", "|---|---|", *rows]))
    return "\n\n".join(sections) + "\n"


def stage_of(module: str) -> str:
    """Return the stage of a module's messages."""
    matches = [(len(path), stage) for stage, paths in STAGES.items() for path in paths if module.startswith(path)]
    return max(matches)[1]


def _entry(message: Message) -> str:
    notes = [note for part, note in NOTES.items() if part in message.text]
    return "  \n    ".join([_quoted(message.text, warning=message.warning), *notes])  # two spaces break the line


def _quoted(text: str, *, warning: bool = False) -> str:
    return f"- {'Warning: ' if warning else ''}`` {text} ``"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        sys.exit(TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
