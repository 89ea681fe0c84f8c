r"""Exact-answer reward for mathematics: 1.0 if the completion's answer equals the reference, else 0.0.

The answer is the last \boxed{}; without a box the last `<answer>`, then what follows `####`, then `answer is`, then the
last formula or number; no number is taken out of a formula. A reference that cannot be read is an abstention (None),
never "wrong". Runs in the worker pool, because some expressions take forever to simplify and must be killed.
"""

from __future__ import annotations

from typing import Any

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.math import UNITS, Units, equals_gold, extract_answer, gold_answers, reference_problem
from llmrl.verify.checks.math_letters import with_options

POOL = True

EXAMPLES = [
    # good
    {"completion": r"... so \boxed{1/2}", "answer": "0.5", "reward": 1.0},
    {"completion": r"\boxed{\left(3, \dfrac{\pi}{2}\right)}", "answer": r"(3, \frac{\pi}{2})", "reward": 1.0},
    {"completion": r"\boxed{1{,}234}", "answer": "She sells 1,000 + 234.\n#### 1,234", "reward": 1.0},
    {"completion": r"\boxed{4}", "answer": r"We get $2 + 2 = \boxed{4}$.", "reward": 1.0},
    {"completion": "The answer is $72.", "answer": "72", "reward": 1.0},
    {"completion": r"<think>maybe \boxed{5}</think> It is \boxed{6}.", "answer": "6", "reward": 1.0},
    {"completion": r"\boxed{2, 1}", "answer": r"\{1, 2\}", "reward": 1.0},
    {"completion": r"\boxed{0.25}", "answer": ["1/4", "25%"], "reward": 1.0},
    {"completion": r"Hence $x = \frac{5}{3}$.", "answer": "5/3", "reward": 1.0},
    {"completion": "Final Answer: The largest $n$ is 34.", "answer": "34", "reward": 1.0},
    {"completion": r"\boxed{\{x \mid -2 \le x < 1\}}", "answer": "[-2,1)", "reward": 1.0},
    {"completion": r"\boxed{0.\overline{3}}", "answer": "1/3", "reward": 1.0},
    {"completion": r"\boxed{A, C}", "answer": "AC", "reward": 1.0},
    {"completion": r"\boxed{Paris}", "answer": "B", "options": ["Rome", "Paris", "Bonn"], "reward": 1.0},
    {"completion": r"\boxed{\binom{5}{2}}", "answer": "10", "reward": 1.0},
    {"completion": r"\boxed{5 \text{ cm}}", "answer": "5 centimeters", "units": "require", "reward": 1.0},
    # bad
    {"completion": r"Hence $x = \frac{5}{3}$.", "answer": "3", "reward": 0.0},
    {"completion": r"\boxed{5 \text{ m}}", "answer": "5 cm", "units": "match", "reward": 0.0},
    {"completion": r"\boxed{5}", "answer": "5 cm", "units": "require", "reward": 0.0},
    {"completion": r"\boxed{Rome}", "answer": "B", "options": ["Rome", "Paris", "Bonn"], "reward": 0.0},
    {"completion": r"... so \boxed{0.6}", "answer": "0.5", "reward": 0.0},
    {"completion": "no answer given", "answer": "0.5", "reward": 0.0},
    {"completion": "", "answer": "0.5", "reward": 0.0},
    {"completion": r"<think>so \boxed{6}", "answer": "6", "reward": 0.0},
    {"completion": "It is 72.", "answer": "72", "require_box": True, "reward": 0.0},
    {"completion": r"so \boxed{6}", "prefilled": "<think>\n", "answer": "6", "reward": 0.0},
    {"completion": r"so 6 </think> \boxed{6}", "prefilled": "<think>\n", "answer": "6", "reward": 1.0},
    # hostile
    {"completion": r"\boxed{1}\boxed{2}\boxed{3}", "answer": "2", "reward": 0.0},
    {"completion": r"\boxed{1 or 2}", "answer": "2", "reward": 0.0},
    {"completion": r"\boxed{1, 2}", "answer": "2", "reward": 0.0},
    {"completion": r"\boxed{2} or \boxed{2", "answer": "2", "reward": 0.0},
    {"completion": r"\boxed{2} then \boxed{2}", "answer": "2", "strict_single_box": True, "reward": 0.0},
    {"completion": r"\boxed{17 \cdot 24}", "answer": "408", "reward": 0.0},
    {"completion": r"\boxed{\binom52}", "answer": "10", "prompt": r"Compute $\binom{5}{2}$.", "reward": 0.0},
    {"completion": r"\boxed{2^{2019}}", "answer": "2^{2018}", "reward": 0.0},
    {"completion": r"\boxed{m(\gamma^2-2)}", "answer": r"m(\gamma^2-1)", "reward": 0.0},
    {"completion": r"\boxed{17 \cdot 24}", "answer": "408", "allow_unevaluated": True, "reward": 1.0},
    {"completion": r"\boxed{17 \cdot 24 = 408}", "answer": "408", "reward": 1.0},
    {"completion": r"\boxed{9^{9^{9^{9}}}}", "answer": "9", "reward": 0.0},
    {"completion": "\\boxed{\x00\ud800}", "answer": "1", "reward": 0.0},
    # references that cannot be read
    {"completion": r"\boxed{1/2}", "answer": "???", "reward": None},
    {"completion": r"\boxed{1/2}", "answer": "", "reward": None},
    {"completion": r"\boxed{1/2}", "answer": None, "reward": None},
]


def warm_up() -> None:
    """Load math-verify and its LaTeX parser (about a second); each worker calls this once, outside any time limit."""
    equals_gold(r"\frac{x}{2} + 9", [r"\frac{y}{3}"])


def check(row: dict[str, Any]) -> str | None:
    """Say why no completion can be compared with the row's answer."""
    return reference_problem(row["answer"])


def math_answer(
    completion: str,
    answer: Any,
    prefilled: str = "",
    require_box: bool = False,
    strict_single_box: bool = False,
    allow_unevaluated: bool = False,
    units: Units = "ignore",
    options: Any = None,
    prompt: Any = "",
) -> Score:
    r"""Compare the completion's answer with the reference.

    Args:
        completion: text of the last assistant message.
        answer: plain answer, GSM8K solution (`#### x`), MATH solution (\boxed{}), or a list of accepted forms.
        prefilled: how the prompt already begins that message, such as `<think>`.
        require_box: count an answer outside a box as wrong.
        strict_single_box: require exactly one box in the completion.
        allow_unevaluated: accept a sum or product that evaluates to a numeric reference; see `equals_gold`.
        units: `ignore` units; `match`: a unit in the answer must be the reference's; `require`: it must also be there.
        options: texts of a multiple choice, or letter -> text; the right one's letter and text both count.
        prompt: the question; a factorial or binomial that stands in it is no answer to it.

    Raises:
        UserError: `units` is not one of its three values.
    """
    if units not in UNITS:
        raise UserError(f"math_answer: units is {units!r}; use {', '.join(UNITS)}")
    extraction = extract_answer(prefilled + completion, require_box=require_box or strict_single_box)
    golds = with_options(gold_answers(answer), options)
    info: dict[str, Any] = {"extracted": extraction.answer, "gold": golds[0] if len(golds) == 1 else golds}
    correct = equals_gold(
        extraction.answer, golds, allow_unevaluated=allow_unevaluated, units=units, question=str(prompt)
    )
    if correct is None:
        return Score(
            reward=None, info=info | {"reason": "the reference answer cannot be read", "answer": str(answer)[:200]}
        )
    if strict_single_box and extraction.num_boxes != 1:
        return Score(reward=0.0, info=info | {"reason": f"{extraction.num_boxes} boxes, expected one"})
    return Score(reward=float(correct), info=info)
