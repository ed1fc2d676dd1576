"""Prompts and responses as text, for the judge. Training never sees it: there, tokens stay tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from spin_plugin.data.real import Real
from spin_plugin.judge.messages import ChatTemplate
from spin_plugin.judge.process import Question


class Texts:
    """Decodes stored responses, with their prompts and real responses."""

    def __init__(self, tokenizer: Any, real: Real) -> None:
        self._tokenizer, self._real = tokenizer, real
        self._template = ChatTemplate(tokenizer)
        self._end_tokens = set(real.stop_tokens)

    def questions(self, responses: Sequence[Mapping[str, Any]]) -> list[Question]:
        """Return what the judge is asked about each response of a shard.

        Args:
            responses: as stored, with `split`, `example` and `tokens`.
        """
        return [
            self._question(self._row(response["split"], response["example"]), response["tokens"])
            for response in responses
        ]

    def real_answers(self, count: int) -> list[Question]:
        """Return the first real responses, each compared with itself."""
        rows = [self._row("train", example) for example in range(min(count, len(self._real.train)))]
        return [self._question(row, row["real"]) for row in rows]

    def _row(self, split: str, example: int) -> dict[str, list[int]]:
        examples = self._real.train if split == "train" else self._real.eval
        assert examples is not None
        return examples[example]

    def _question(self, row: Mapping[str, Sequence[int]], synthetic: Sequence[int]) -> Question:
        text = self._tokenizer.decode(row["prompt"], clean_up_tokenization_spaces=False)
        prompt = {"text": text, "messages": self._template.messages(text)}
        return Question(prompt, self._response(row["real"]), self._response(synthetic))

    def _response(self, tokens: Sequence[int]) -> str:
        """Return a response without special tokens and without its end token, which need not be special."""
        ended = tokens and tokens[-1] in self._end_tokens
        tokens = tokens[:-1] if ended else tokens
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
