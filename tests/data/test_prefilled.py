"""How a rendered prompt already begins the assistant's message, and what rewards make of it."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from llmrl.data.chat import Chat
from llmrl.tiny import byte_tokenizer
from llmrl.types import Message, RolloutGroup
from llmrl.verify.rows import row_to_rollout
from llmrl.verify.rubric import Rubric

TURN = "<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|eos|>\n"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\nPREFILLED{% endif %}"
PLAIN = LOOP.replace("CONTENT", "m['content']")
LAST_THINKS = LOOP.replace(
    "CONTENT",
    "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') + m['content']",
)
ALL_THINK = LOOP.replace(
    "CONTENT",
    "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']",
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ 'sys ' if loop.last else '' }}"
    "{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
NO_HISTORY = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}" + PLAIN


def chat(template: str, prompt_format: Any = "chat") -> Chat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, prompt_format=prompt_format)


@pytest.mark.parametrize(
    ("template", "prefilled"),
    [
        (PLAIN + ASK.replace("PREFILLED", ""), ""),
        (PLAIN + ASK.replace("PREFILLED", "<think>\n"), "<think>\n"),
        (PLAIN + ASK.replace("PREFILLED", "<reasoning>"), "<reasoning>"),
        (PLAIN + ASK.replace("PREFILLED", "<think>\n\n</think>\n\n"), "<think>\n\n</think>\n\n"),
        (PLAIN + "<|im_start|>assistant\n<think>", "<think>"),  # whether it is asked to or not
        (LAST_THINKS + ASK.replace("PREFILLED", ""), ""),
        (LAST_THINKS + ASK.replace("PREFILLED", "<think>\n"), "<think>\n"),
        (ALL_THINK + ASK.replace("PREFILLED", "<think>\n"), "<think>\n"),
        (ALL_THINK + ASK.replace("PREFILLED", ""), ""),
        (PLAIN + ASK.replace("PREFILLED", "\n"), ""),
        (MISTRAL, ""),
        (NO_HISTORY + ASK.replace("PREFILLED", "<think>\n"), "<think>\n"),
        (NO_HISTORY + ASK.replace("PREFILLED", ""), ""),
    ],
)
def test_what_a_template_writes_at_the_beginning_of_the_message(template: str, prefilled: str) -> None:
    assert chat(template).prefilled([Message(role="user", content="2+2?")]) == prefilled


@pytest.mark.parametrize(
    ("name", "thinks", "does_not"),
    [
        ("deepseekv3", "<think>\n", "<think>\n"),
        ("gemma3", "", ""),
        ("glm4moe", "", "<think></think>"),
        ("gptoss", "", ""),
        ("llama3", "", ""),
        ("qwen2_5", "", ""),
        ("qwen3", "", "<think>\n\n</think>\n\n"),
        ("qwen3_5_think", "<think>\n", "<think>\n\n</think>\n\n"),
        ("qwen3_instruct_2507", "", ""),
    ],
)
def test_templates_of_real_models(name: str, thinks: str, does_not: str) -> None:
    spec = importlib.util.find_spec("trl")
    file = Path(spec.origin or "").parent / "chat_templates" / f"{name}.jinja" if spec is not None else Path()
    if not file.is_file():
        pytest.skip("this version of TRL ships no such template")
    of_model, question = chat(file.read_text()), [Message(role="user", content="2+2?")]
    assert of_model.prefilled(question) == thinks
    assert of_model.prefilled(question, enable_thinking=False) == does_not


def test_the_options_of_a_task_count() -> None:
    switched = chat(PLAIN + ASK.replace("PREFILLED", "{% if not enable_thinking %}<think></think>{% endif %}"))
    question = [Message(role="user", content="2+2?")]
    assert switched.prefilled(question, enable_thinking=True) == ""
    assert switched.prefilled(question, enable_thinking=False) == "<think></think>"


@pytest.mark.parametrize(
    ("prompt", "prefilled"),
    [
        ("Use <think> tags.\nAssistant: Let me solve this.\n<think>", "<think>"),
        ("Q\nA: <reasoning>\n", "<reasoning>\n"),
        ("Use <think> and <answer> tags.", ""),
        ("std::vector<int>", ""),
        ("</think>", ""),
    ],
)
def test_a_text_prompt_may_end_with_an_opening_tag(prompt: str, prefilled: str) -> None:
    assert chat(PLAIN, "text").prefilled([Message(role="user", content=prompt)]) == prefilled


def score(spec: str, row: dict[str, Any]) -> float | None:
    async def main() -> float | None:
        rubric = Rubric([spec])
        try:
            rollout = row_to_rollout(row, name="t")
            await rubric.score_group(RolloutGroup(task=rollout.task, rollouts=[rollout]))
            assert rollout.score is not None
            assert rollout.score.error is None
            return rollout.score.reward
        finally:
            await rubric.close()

    return asyncio.run(main())


def test_rewards_read_thinking_that_the_prompt_opened() -> None:
    """Cut off, it is thinking and no answer; closed, what follows is the answer."""
    for spec, answer, columns in (
        ("math_answer", r"\boxed{4}", {"answer": "4"}),
        ("qa_match", "<answer>4</answer>", {"answer": "4"}),
        ("box_iou", "<answer>[0, 0, 9, 9]</answer>", {"answer": [0, 0, 9, 9]}),
        ("unit_tests", "def f():\n    return 4", {"test_list": ["assert f() == 4"]}),
    ):
        row = {"prompt": "q", "prefilled": "<think>\n", **columns}
        assert score(spec, row | {"completion": answer}) == 0.0, spec
        assert score(spec, row | {"completion": f"so </think>{answer}"}) == 1.0, spec
    assert score("format_tags", {"completion": "a</think><answer>4</answer>", "prefilled": "<think>\n"}) == 1.0
