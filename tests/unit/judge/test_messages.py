"""Chat messages are recovered from a prompt's text, or not at all."""

from itertools import product
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer

from spin_plugin.data.real import Real
from spin_plugin.judge.messages import ChatTemplate
from spin_plugin.judge.texts import Texts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen's: a system message of its own if there is none.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
)
# As reasoning models': the generation prompt opens a thought that the answers do not have.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Puts the last message first, so nothing can be split.
REVERSED = "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "thinking": THINKING,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
WITHOUT_SYSTEM = ("gemma", "mistral")


def tokenizer(template: str | None) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


READERS = {name: (made := tokenizer(template), ChatTemplate(made)) for name, template in TEMPLATES.items()}


def conversation(turns: int, *, system: bool) -> list[dict[str, str]]:
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [{"role": role, "content": f"{role} says {number}\n\nand more."} for number, role in enumerate(roles[:-1])]


CASES = [
    (name, turns, system)
    for name, turns, system in product(TEMPLATES, (1, 2, 4), (False, True))
    if not (system and name in WITHOUT_SYSTEM)
]


@pytest.mark.parametrize(("name", "turns", "system"), CASES)
def test_messages_are_recovered(name: str, turns: int, system: bool) -> None:
    made, template = READERS[name]
    messages = conversation(turns, system=system)
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.messages(text) == messages


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["", "question 1", "<|im_start|>", "<|im_start|>user\nhello", "[INST] hello"])
def test_other_texts_have_no_messages(name: str, text: str) -> None:
    assert READERS[name][1].messages(text) is None


@pytest.mark.parametrize("template", [None, REVERSED, "constant", "{{ messages.absent.key }}", "{{ 1 + 'a' }}"])
def test_template_that_cannot_be_read_backwards_gives_none(template: str | None) -> None:
    made = tokenizer(template)
    assert ChatTemplate(made).messages("a|b|") is None
    assert ChatTemplate(made).messages("constant") is None


def test_message_that_the_template_alters_gives_none() -> None:
    """The text has a space that trimming would remove, so it is not what the template makes of any messages."""
    made, template = READERS["llama3"]
    text = made.apply_chat_template(conversation(1, system=False), tokenize=False, add_generation_prompt=True)
    assert template.messages(text.replace("user says", " user says")) is None


CONTENTS = st.text(alphabet="ab \n<|im_end|>[/INST]ü", min_size=1, max_size=20)


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(CONTENTS, min_size=1, max_size=5).filter(lambda c: len(c) % 2))
def test_recovered_messages_always_render_the_text(name: str, contents: list[str]) -> None:
    made, template = READERS[name]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = template.messages(text)
    assert found is None or made.apply_chat_template(found, tokenize=False, add_generation_prompt=True) == text


def test_questions_have_messages_and_no_special_tokens() -> None:
    made, _ = READERS["chatml"]
    messages = conversation(2, system=True)
    prompt = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    end = made.convert_tokens_to_ids("<|im_end|>")
    newline = made.encode("\n", add_special_tokens=False)
    tokens = [made.encode(text, add_special_tokens=False) for text in (prompt, "real", "synthetic")]
    rows = Dataset.from_dict({"prompt": [tokens[0]], "real": [[*tokens[1], end]]})
    texts = Texts(made, Real(rows, None, [end, *newline]))
    (question,) = texts.questions([{"split": "train", "example": 0, "tokens": [*tokens[2], *newline]}])
    assert question == ({"text": prompt, "messages": messages}, "real", "synthetic")
    assert texts.real_answers(9)[0].synthetic == "real"


@pytest.mark.parametrize("error", ["{{ 1 / 0 }}", "{{ messages[9].content.x }}", "{% for x in 5 %}{% endfor %}"])
def test_template_that_fails_in_any_way_yields_no_messages(error: str) -> None:
    """Jinja raises Python's own errors, too."""
    assert ChatTemplate(tokenizer(error)).messages("text") is None
