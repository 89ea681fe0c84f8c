"""Hand-labeled pairs of reference and answer, hostile formulas, and math-verify on the same pairs."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmrl.types import Score
from llmrl.verify.checks.math import equals_gold, gold_answers, is_readable, reference_problem
from llmrl.verify.checks.math_letters import chosen_letters, with_options
from llmrl.verify.checks.math_spelling import normalize
from llmrl.verify.checks.math_symbols import cpu_limit, parse
from llmrl.verify.checks.math_units import same_unit, unit_of
from llmrl.verify.pool import Pool
from llmrl.verify.spec import resolve
from tests.verify.math_pairs import RIGHT, UNBOXED_RIGHT, UNBOXED_WRONG, WRONG


def reward_of(completion: str, answer: object, **options: object) -> float | None:
    score = resolve("math_answer")(completion, answer, **options)
    assert isinstance(score, Score)
    return score.reward


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers_are_accepted(kind: str) -> None:
    assert [(g, p) for g, p in RIGHT[kind] if reward_of(f"\\boxed{{{p}}}", g) != 1.0] == []


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answers_are_refused(kind: str) -> None:
    assert [(g, p) for g, p in WRONG[kind] if reward_of(f"\\boxed{{{p}}}", g) != 0.0] == []


def test_answers_outside_a_box() -> None:
    assert [(g, p) for g, p in UNBOXED_RIGHT if reward_of(p, g) != 1.0] == []
    assert [(g, p) for g, p in UNBOXED_WRONG if reward_of(p, g) != 0.0] == []


def test_every_right_reference_passes_the_check_of_rows() -> None:
    golds = [gold for pairs in (*RIGHT.values(), UNBOXED_RIGHT) for gold, _ in pairs]
    assert [gold for gold in golds if reference_problem(gold) is not None] == []
    assert [gold for gold in golds if not is_readable(gold_answers(gold)[0])] == []


def test_math_verify_alone_is_worse_on_these_pairs() -> None:
    """The pairs are hard: math-verify as its documentation calls it gets fewer of a sample right."""
    from math_verify import parse as theirs
    from math_verify import verify

    pairs = [(g, p, True) for ps in RIGHT.values() for g, p in ps[::6]]
    pairs += [(g, p, False) for ps in WRONG.values() for g, p in ps[::6] if "^{9" not in p]

    def verdict(gold: str, answer: str) -> bool:
        try:
            read = [theirs(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
            return bool(verify(*read, timeout_seconds=None))
        except Exception:
            return False

    num_right = sum(verdict(g, p) == label for g, p, label in pairs)
    assert num_right < 0.95 * len(pairs)


@pytest.mark.slow
def test_no_hostile_answer_is_an_error() -> None:
    """Each costs a bounded processor time and is refused: neither error nor abstention."""
    hostile = [
        (r"\frac{\pi}{2}", r"\int_0^\infty \frac{\sin x}{x} dx"),
        (r"x^2", r"\sum_{k=1}^{n} \frac{k^3+x}{k^2+1}"),
        (r"\int_0^1 f(x) dx", r"\int_0^\infty e^{-x^2}\sin(x^3)\ln(x) dx"),
        (r"(0,1)", r" \cup ".join(f"({i},{i + 1})" for i in range(60))),
        (r"(0,19)", r" \cup ".join(f"({i},{i}.5)" for i in range(19))),
        ("2^{2018}", "2^{2019}"),
        ("10^{400}", "10^{500}"),
        ("x", "+".join(f"\\sin({i}x)^{{{i}}}" for i in range(1, 30))),
        ("x", r"\sqrt{x+" * 20 + "1" + "}" * 20),
        ("1", r"\prod_{i=1}^{\infty} (1-x^i)"),
        ("9", "2^{2^{2^{2^{2}}}}"),
    ]

    async def main() -> list[Score]:
        pool = Pool(2)
        try:
            calls = [
                pool.call(
                    "rewards/math_answer.py:math_answer", {"completion": f"\\boxed{{{text}}}", "answer": gold}, 60.0
                )
                for gold, text in hostile
            ]
            return await asyncio.gather(*calls)
        finally:
            await pool.close()

    assert [score.reward for score in asyncio.run(main())] == [0.0] * len(hostile)


def test_a_computation_ends_at_its_limit_of_processor_time() -> None:
    started = time.process_time()
    with cpu_limit(0.2) as ended:
        while True:
            pass
    assert ended == [True]
    assert time.process_time() - started < 2
    with cpu_limit(5.0) as ended:
        pass
    assert ended == []


def test_a_formula_without_a_value_is_unreadable() -> None:
    assert parse(r"\frac{1}{0}") == []
    assert parse(r"m(\gamma^2-1)") != []


@pytest.mark.parametrize(
    ("unit", "ignore", "match", "require"),
    [
        (r"5 \text{ cm}", 1.0, 1.0, 1.0),
        ("5 centimeters", 1.0, 1.0, 1.0),
        ("5", 1.0, 1.0, 0.0),
        ("5 m", 1.0, 0.0, 0.0),
        (r"5 \text{ cm}^2", 1.0, 0.0, 0.0),
        ("6 cm", 0.0, 0.0, 0.0),
    ],
)
def test_units_when_asked_for(unit: str, ignore: float, match: float, require: float) -> None:
    for units, reward in (("ignore", ignore), ("match", match), ("require", require)):
        assert reward_of(f"\\boxed{{{unit}}}", r"5\text{ cm}", units=units) == reward
        assert reward_of(f"\\boxed{{{unit}}}", "5", units=units) == ignore  # nothing to compare with


@pytest.mark.parametrize(
    ("answer", "unit", "same"),
    [("5 cm^2", "square centimeters", True), ("5 km/h", "kilometers per hour", True), ("5 cm^3", "cm^2", False)],
)
def test_one_unit_in_two_spellings(answer: str, unit: str, same: bool) -> None:
    assert same_unit(unit_of(answer), unit) == same


def test_options_count_by_letter_and_by_text() -> None:
    options = ["12", "15", "18"]
    assert with_options(["B"], options) == ["B", "15"]
    assert with_options(["15"], {"A": "12", "B": "15"}) == ["15", "B"]
    assert with_options(["15"], {"label": ["A", "B"], "text": ["12", "15"]}) == ["15", "B"]
    assert with_options(["B"], ["A) 12", "B) 15"]) == ["B", "15"]
    assert with_options(["B"], ["12", "12"]) == ["B"]  # the same text twice decides nothing
    assert with_options(["B"], ["C", "A"]) == ["B"]  # a text that is another letter
    assert with_options(["B"], "12, 15") == ["B"]
    for text, reward in (("15", 1.0), ("B", 1.0), ("(B) 15", 1.0), ("12", 0.0), ("A", 0.0), ("12, 15", 0.0)):
        assert reward_of(f"\\boxed{{{text}}}", "B", options=options) == reward


@pytest.mark.parametrize(
    ("text", "letters"),
    [("(B)", "B"), ("A and C", "AC"), ("B. 12", "B"), ("A: 1, B: 2", ""), ("AA", ""), ("B or C", ""), ("12", "")],
)
def test_chosen_letters(text: str, letters: str) -> None:
    assert chosen_letters(text) == frozenset(letters)


def test_a_lone_binomial_is_an_answer_unless_the_question_holds_it() -> None:
    asked = r"What is $\dbinom{5}{2}$?"
    assert reward_of(r"\boxed{\binom52}", "10", prompt="How many pairs?") == 1.0
    assert reward_of(r"\boxed{\binom52}", "10", prompt=asked) == 0.0
    assert reward_of(r"\boxed{\binom52}", "10", prompt=asked, allow_unevaluated=True) == 1.0
    assert reward_of(r"\boxed{\binom52 + 0}", "10") == 0.0


def test_normalizing_twice_changes_nothing() -> None:
    pairs = [pair for table in (RIGHT, WRONG) for rows in table.values() for pair in rows]
    texts = [normalize(text) for pair in pairs for text in pair]
    assert [text for text in texts if equals_gold(text, [text]) is False] == []
