"""Format reward: 1.0 if the completion is exactly <think>...</think> followed by <answer>...</answer>, else 0.0.

Each tag must occur once, in this order, with only white space around them and a non-empty answer. `tags`
names other tags. A tag that the chat template puts at the end of the prompt (`prefilled`) counts as opened.
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = [
    # good
    {"completion": "<think>2 + 2</think><answer>4</answer>", "reward": 1.0},
    {"completion": "<think>\n2 + 2\n</think>\n<answer>\n4\n</answer>\n", "reward": 1.0},
    {"completion": "<think></think><answer>4</answer>", "reward": 1.0},
    {"completion": "<plan>a</plan><code>b</code>", "tags": ["plan", "code"], "reward": 1.0},
    {"completion": "2 + 2</think><answer>4</answer>", "prefilled": "<think>\n", "reward": 1.0},
    # bad
    {"completion": "", "reward": 0.0},
    {"completion": "<answer>4</answer>", "reward": 0.0},
    {"completion": "<answer>4</answer><think>2 + 2</think>", "reward": 0.0},
    {"completion": "<think>2 + 2</think><answer> </answer>", "reward": 0.0},
    {"completion": "<think>2 + 2</think><answer>4", "reward": 0.0},
    {"completion": "2 + 2</think><answer>4</answer>", "reward": 0.0},
    {"completion": "<think>2 + 2</think><answer>4</answer>", "prefilled": "<think>", "reward": 0.0},
    # hostile
    {"completion": "<think>a</think><answer>1</answer><answer>2</answer>", "reward": 0.0},
    {"completion": "<think><think>a</think></think><answer>1</answer>", "reward": 0.0},
    {"completion": "<think>a<answer>1</think></answer>", "reward": 0.0},
    {"completion": "<think>a</think>so: <answer>1</answer>", "reward": 0.0},
    {"completion": "<think>a</think><answer>1</answer> or 2", "reward": 0.0},
    {"completion": "<think>" * 1000, "reward": 0.0},
]


def format_tags(completion: str, tags: Sequence[str] = ("think", "answer"), prefilled: str = "") -> float:
    """Return 1.0 if the completion consists of the `tags` in their order, each opened and closed once; else 0.0.

    Args:
        completion: text of the last assistant message.
        tags: names of the tags.
        prefilled: how the prompt already begins that message, such as `<think>`; it belongs to what is judged.
    """
    completion = prefilled + completion
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(completion.count(mark) != 1 for mark in marks):
        return 0.0
    rest = completion
    between: list[str] = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:  # the mark occurs, but out of order
            return 0.0
        between.append(before)
    outside = [*between[0::2], rest]
    return float(not any(text.strip() for text in outside) and bool(between[-1].strip()))
