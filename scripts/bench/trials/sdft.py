"""SDFT (self-distillation fine-tuning, arXiv 2601.19897) by TRL, up to a limit of compute.

    python scripts/bench/trials/sdft.py MODEL DATA.jsonl OUT --learning-rate 1e-5 --limit 3000000

The student answers each prompt at temperature 1. The teacher, a moving average of the student as in the paper, has the
demonstration, the last message of a row, in its prompt. The student learns the teacher's distribution at each token of
its own answer, by the paper's objective: KL(student || teacher) over the full vocabulary. The model goes to
OUT/compute-N, N being the compute so far, at evenly spaced points of the limit: each is the last model that does not
exceed its point.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

sys.path.append(str(Path(__file__).resolve().parents[1]))

from trials.methods import TRAINED

TEMPLATE = """{prompt}

This is an example for a response to the question:
{privileged_context}

Now answer with a response of your own."""
"""The paper's, which goes on with "including the thinking process": our answers have none."""


def compute(prompt: int, completion: int, teacher_prompt: int) -> int:
    """Count the compute of rows from their real tokens.

    The student generates the completion and is trained on prompt and completion; the teacher scores the completion.
    """
    return (1 + TRAINED) * (prompt + completion) + teacher_prompt + completion


def batch_compute(batch: dict[str, torch.Tensor]) -> int:
    """Count the compute of a batch of the trainer; padding does not count."""
    masks = ("prompt_mask", "completion_mask", "teacher_attention_mask")
    prompt, completion, teacher = (int(batch[mask].sum()) for mask in masks)
    return compute(prompt, completion, teacher - completion)


class Trainer(SDFTTrainer):
    """Counts compute, saves the model and stops at the last point.

    Attributes:
        compute: of all steps so far.
        points: compute at which the model is still to be saved, ascending.
    """

    compute = 0
    points: list[int]

    def expect_steps(self) -> None:
        """Set the number of steps up to the last point, as if completions were as long as demonstrations."""
        prompts, shown = self.train_dataset["prompt"][:], self.train_dataset["privileged_context"][:]
        teacher_prompts = self.teacher_context_builder.select_generation_prompts(prompts, shown)
        prompt, teacher = (sum(map(len, self._tokenize_prompts(rows))) for rows in (prompts, teacher_prompts))
        completion = sum(len(ids) + 1 for ids in self._tokenizer(shown, add_special_tokens=False)["input_ids"])
        of_step = compute(prompt, completion, teacher) / len(prompts) * self.args.train_batch_size
        self.args.max_steps = max(1, round(self.points[-1] / of_step))

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Save before the step that would pass a point; only now its completions, so its compute, are known."""
        batch: dict[str, Any] = super()._prepare_training_batch(inputs)
        after = self.compute + batch_compute(batch)
        if after > self.points[0]:
            self.save_here()
            self.points = [point for point in self.points if point >= after]
            self.control.should_training_stop = not self.points
        self.compute = after
        return batch

    def save_here(self) -> None:
        self.save_model(f"{self.args.output_dir}/compute-{self.compute}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="JSONL with `messages`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--limit", type=int, required=True, help="compute of the whole run")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-completion", type=int, default=256, help="tokens")
    parser.add_argument("--stop", help="token that ends a completion, if it is not the tokenizer's end token")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; the weights stay fp32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.eos_token = options.stop or tokenizer.eos_token
    rows = [json.loads(line)["messages"] for line in options.data.open(encoding="utf-8")]
    config = SDFTConfig(
        output_dir=str(options.out),
        teacher_model_kind="ema",
        teacher_prompt_template=TEMPLATE,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        num_generations=1,
        temperature=1.0,
        max_prompt_length=None,
        max_completion_length=options.max_completion,
        generation_kwargs={"use_cache": True},
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        optim="adamw_torch",
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        gradient_checkpointing=False,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),  # bf16 requires it
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": row[:-1], "privileged_context": row[-1]["content"]} for row in rows])
    trainer = Trainer(str(options.model), config, data, processing_class=tokenizer)
    trainer.points = [options.limit * point // options.checkpoints for point in range(1, options.checkpoints + 1)]
    trainer.expect_steps()
    trainer.train()
    if trainer.points:
        trainer.save_here()


if __name__ == "__main__":
    main()
