"""The trainer's batch contains exactly the token ids that vLLM received and returned."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, chat_rows, make_model, spin_config, write_config, write_jsonl
from transformers import AutoTokenizer

from spin_plugin.model.layout import PairCollator
from spin_plugin.run.directory import RunDir
from spin_plugin.training.prepare import open_pairs

pytestmark = pytest.mark.slow

# A wrapper of vLLM's interpreter that records its prompts and responses.
RECORDER = """#!{python}
import json, os, sys
if len(sys.argv) < 3 or not sys.argv[1].endswith("vllm_worker.py"):
    os.execv({vllm!r}, [{vllm!r}, *sys.argv[1:]])
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import vllm_worker
from pathlib import Path
def recorded(job, request_files):
    with open({record!r}, "w", buffering=1) as out:  # the dispatcher kills a worker that has finished
        prompts = {{}}
        for file in Path(job["requests"]).glob("*.jsonl"):
            for line in open(file):
                request = json.loads(line)
                prompts[request["number"]] = request["prompt"]
        for answer in vllm_worker.serve(job, request_files):
            if "number" in answer:
                out.write(json.dumps([prompts[answer["number"]], answer["tokens"]]) + "\\n")
            yield answer
sys.argv = sys.argv[1:]
vllm_worker.main(recorded)
"""

ALPACA = [{"instruction": f"count to {n}", "input": "", "output": f"1 to {n}, {n} times"} for n in range(12)]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str]] = {
    # name: rows, changes to the configuration, the tokenizer's EOS, the end token of real responses
    "chatml of three turns": (chat_rows(8, turns=3), {}, "</s>", "<|im_end|>"),
    "llama3": (chat_rows(12), {"chat_template": "llama3", "eot_tokens": ["<|eot_id|>"]}, "</s>", "<|eot_id|>"),
    "gemma": (chat_rows(12), {"chat_template": "gemma", "eot_tokens": ["<end_of_turn>"]}, "</s>", "<end_of_turn>"),
    "alpaca": (ALPACA, {"chat_template": None, "eot_tokens": None, "type": "alpaca"}, "</s>", "</s>"),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_contains_the_token_ids_of_vllm(
    case: str, tmp_path: Path, run_jobs: Callable[..., None], vllm_python: Path
) -> None:
    rows, changes, eos, end = CASES[case]
    model = make_model(tmp_path / "model", eos=eos)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = {"path": str(data), "ds_type": "json", "type": changes.pop("type", "chat_template")}
    config = spin_config(tmp_path, model, data, datasets=[dataset], sequence_len=256, **changes)
    recorder, record = tmp_path / "python", tmp_path / "record.jsonl"
    text = RECORDER.format(python=vllm_python, vllm=str(vllm_python), record=str(record))
    recorder.write_text(text)
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)

    environment = {"SPIN_VLLM_PYTHON": str(recorder)}
    run_jobs((write_config(tmp_path, config), 1), command="preprocess", environment=environment)

    recorded = {tuple(prompt) + tuple(answer) for prompt, answer in map(json.loads, record.read_text().splitlines())}
    pairs = open_pairs(RunDir(tmp_path / "run").iteration(0)).train
    batch = PairCollator(byte_tokenizer(eos))([pairs[index] for index in range(len(pairs))])
    half = len(pairs)
    for row in range(half, 2 * half):
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tuple(tokens.tolist()) in recorded
    assert_real_side_is_the_rendered_data(batch, half, rows, model, end)


def assert_real_side_is_the_rendered_data(
    batch: dict[str, torch.Tensor], half: int, rows: list[dict[str, Any]], model: Path, end: str
) -> None:
    """Assert that every real row ends with the end token and contains a response of the data."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = {row["output"] for row in rows if "output" in row}
    answers |= {m["content"] for row in rows for m in row.get("messages", []) if m["role"] == "assistant"}
    for row in range(half):
        targets = batch["targets"][batch["segments"] == row].tolist()
        assert targets[-1] == tokenizer.convert_tokens_to_ids(end)
        assert tokenizer.decode(targets[:-1]).strip() in answers
