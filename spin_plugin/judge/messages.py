"""Recover the chat messages of a prompt from its text, with the tokenizer's chat template.

SPIN stores prompts as tokens, whatever the dataset's format was. Rendering a few conversations shows which text the
template puts between two messages, depending on their roles; a prompt is split at these texts. The result counts only
if the template renders it to exactly the prompt.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Message = dict[str, str]
START, END = "", "end"  # beside the roles: the places before the first message and after the last
CONVERSATIONS = (("user",), ("user", "assistant", "user"), ("system", "user"))


class ChatTemplate:
    """A tokenizer's chat template, read backwards."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._between: dict[tuple[str, str], str] = {}
        """The text between messages of two roles."""
        for roles in CONVERSATIONS:
            self._learn(roles)

    def messages(self, text: str) -> list[Message] | None:
        """Return the messages that are rendered to `text`; None if there are none."""
        found = self._split(text)
        return found if found and self._render(found) == text else None

    def _learn(self, roles: Sequence[str]) -> None:
        """Learn the texts between the messages of one conversation."""
        contents = [f"message{number}of{len(roles)}" for number in range(len(roles))]
        turns = zip(roles, contents, strict=True)
        rest = self._render([{"role": role, "content": content} for role, content in turns])
        if rest is None or any(rest.count(content) != 1 for content in contents):
            return  # not every template allows a system message
        for places, content in zip(pairwise([START, *roles]), contents, strict=True):
            between, _, rest = rest.partition(content)
            self._between.setdefault(places, between)
        self._between.setdefault((roles[-1], END), rest)

    def _split(self, text: str) -> list[Message]:
        """Split a text wherever a message of another role can begin; empty if it does not fit."""
        begins = {right: between for (left, right), between in self._between.items() if left == START}
        fitting = [role for role in begins if text.startswith(begins[role])]
        role = max(fitting, key=lambda role: len(begins[role]), default=END)
        place = len(begins.get(role, ""))
        messages: list[Message] = []
        while role != END:
            breaks = [self._break(text, place, role, right) for left, right in self._between if left == role]
            found = min(filter(None, breaks), default=None)
            if found is None:
                return []
            messages.append({"role": role, "content": text[place : found.stop]})
            place, role = found.start, found.role
        return messages

    def _break(self, text: str, place: int, role: str, following: str) -> "_Break | None":
        """Find the first place, from `place` on, at which a message of `role` can end because `following` begins."""
        between = self._between[role, following]
        if following == END:
            stop = len(text) - len(between)
            return _Break(stop, False, len(text), END) if stop >= place and text.endswith(between) else None
        stop = text.find(between, place) if between else -1
        return _Break(stop, True, stop + len(between), following) if stop >= 0 else None

    def _render(self, messages: list[Message]) -> str | None:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # noqa: BLE001 - a template can raise anything
            return None


class _Break(NamedTuple):
    """The text between two messages; the smallest comes first, and at the same place the end of the prompt."""

    stop: int
    """Where the message before it ends."""
    goes_on: bool
    start: int
    """Where the message after it begins."""
    role: str
    """The role of the message after it."""
