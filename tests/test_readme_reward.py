"""The README's own reward scores right answers of the recipe that the README runs it with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmrl.data.options import DataConfig
from llmrl.data.tasks import load_tasks
from llmrl.verify.reward import load_reward

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def test_it_scores_right_answers_of_the_recipe(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(# my_reward\.py\n.*?)```", text, flags=re.DOTALL)
    (pattern,) = set(re.findall(r"--(?:eval\.)?data\.answer_pattern '(.+?)'", text))
    (tmp_path / "my_reward.py").write_text(code)
    score = load_reward(f"{tmp_path}/my_reward.py:short_and_right").function
    assert score("So it is \\boxed{1,200}.", "1,200") == pytest.approx(0.996)
    assert score("I think 7, or 8", "7") == score("none", "7") == 0.0
    if not GSM8K.is_dir():
        pytest.skip("no GSM8K beside the checkout")
    tasks = load_tasks(DataConfig(path=str(GSM8K), answer_pattern=pattern, limit=500))
    assert all(score(f"Let us see. The answer is \\boxed{{{task.answer}}}.", task.answer) > 0.9 for task in tasks)
