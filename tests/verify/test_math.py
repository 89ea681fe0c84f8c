"""Mathematical answers: what is extracted, which answers are equal, and hostile texts."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from llmrl.types import Score
from llmrl.verify.checks.math import equals_gold, extract_answer, gold_answers, last_box
from llmrl.verify.checks.math_spelling import normalize
from llmrl.verify.checks.math_symbols import is_tame, parse, surely_differ
from llmrl.verify.spec import resolve
from llmrl.verify.thinking import without_thinking

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))


def reward_of(completion: str, answer: object, **options: bool) -> float | None:
    score = resolve("math_answer")(completion, answer, **options)
    assert isinstance(score, Score)
    return score.reward


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7$", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed", None),
        ("It is 5.\n#### 1,234\n", "1,234"),
        ("The answer is 42.", "42"),
        ("the answer is: **42** dollars.", "42** dollars"),
        (r"The final answer is $\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
        (r"Answer: \(x = 3\)", "x = 3"),
        ("The answer is 3.5 because 7/2.", "3.5"),
        ("First 3 apples, then -4.5", "-4.5"),
        ("1,234,567 in all", "1,234,567"),
        ("half: 1/2", "1/2"),
        ("nothing here", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text).answer == answer


def test_a_box_can_be_required() -> None:
    assert extract_answer("The answer is 5", require_box=True).answer is None
    assert extract_answer(r"\boxed{5}", require_box=True).answer == "5"


# --- the gold answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "forms"),
    [
        ("72", ["72"]),
        (72, ["72"]),
        ("16 - 7 = <<16-7=9>>9\n#### 9", ["9"]),
        (r"We get $\boxed{\frac{1}{2}}$.", [r"\frac{1}{2}"]),
        (["1/2", "0.5"], ["1/2", "0.5"]),
        ("", []),
        ("???", []),
        (None, []),
        ({"a": 1}, []),
        (True, []),
        ("#### ", []),
    ],
)
def test_gold_forms(answer: object, forms: list[str]) -> None:
    assert gold_answers(answer) == forms


@pytest.mark.parametrize("answer", ["", "???", None, r"\frac{1}{", {"a": 1}, "9" * 2000])
def test_an_unreadable_gold_is_an_abstention(answer: object) -> None:
    assert reward_of(r"\boxed{1}", answer) is None
    assert reward_of("no answer", answer) is None


# --- equivalence ------------------------------------------------------------------------------------------------------

EQUAL = [
    ("1/2", "0.5"),
    (r"\frac12", "0.5"),
    (r"\frac{3}{4}", r"\tfrac34"),
    (r"1\frac{1}{2}", "3/2"),
    ("3/2", "1 1/2"),
    ("-3/2", r"-1\frac12"),
    ("1/3", "0.333333"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    ("1234567", "1 234 567"),
    (r"11,\! 111,\! 111", "11111111"),
    ("2000", "2e3"),
    ("2000", r"2 \times 10^3"),
    ("1000000", "10^6"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("0.5", "50%"),
    (r"\$36", "36"),
    ("36", "$36"),
    ("36", "36 dollars"),
    ("72", "72 miles per hour"),
    ("12", "12 cm^2"),
    ("5 months", "5"),
    ("5", r"5 \text{ cm}^2"),
    (r"90^\circ", "90"),
    ("90", "90\u00b0"),
    ("90", "90 degrees"),
    ("-3", "\u22123"),
    ("3", "3.0"),
    ("72", "72."),
    ("4.5", r"\approx 4.5"),
    (r"\text{Evelyn}", "evelyn"),
    ("east", r"\text{east}"),
    (r"\text{(C)}", "C"),
    ("B", r"\textbf{(B)}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \dfrac{\pi}{2} \right)"),
    ("(3,4]", "(3, 4]"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"\{1,2\}", "2, 1"),
    ("1,-2", "-2 and 1"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt{5}, 1-\sqrt{5}"),
    ("x^2+1", "1+x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("5", "x=5"),
    ("y=2x+1", "2x+1"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
]
DIFFERENT = [
    ("72", "73"),
    ("1/2", "-1/2"),
    ("1/3", "0.333"),
    ("72", "72 or 73"),
    ("72", r"72 \text{ or } 73"),
    ("72", "72, 73"),
    ("72", r"\{72, 73\}"),
    ("72", "72; 73"),
    ("72", "72 73"),
    ("145", "72 73"),
    ("72", "7 2"),
    ("72", r"\text{72 or 73}"),
    ("72", r"73 \text{ (not 72)}"),
    ("72", r"\pm 72"),
    ("72", "x = 71, x = 72"),
    ("72", r"72\cup 73"),
    ("1,2", "1"),
    ("(3,4]", "[3,4]"),
    ("(1,2)", "(2,1)"),
    ("5", "5 million"),
    ("3", "3 fifths"),
    ("3", "3 and a half"),
    ("7", "7 dollars or nothing"),
    ("4", r"x \le 4"),
    (r"\text{Evelyn}", "Navin"),
    ("10", "x"),
    ("x", "10"),
    ("0", r"\emptyset"),
    ("9", r"\frac{1}{0}"),
    ("9", "(" * 60),
]


@pytest.mark.parametrize(("gold", "prediction"), EQUAL)
def test_equal(gold: str, prediction: str) -> None:
    assert reward_of(f"\\boxed{{{prediction}}}", gold) == 1.0


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT)
def test_different(gold: str, prediction: str) -> None:
    assert reward_of(f"\\boxed{{{prediction}}}", gold) == 0.0


def test_several_boxes_are_not_several_guesses() -> None:
    assert reward_of(r"\boxed{1} \boxed{2} \boxed{3}", "2") == 0.0
    assert reward_of(r"\boxed{1} \boxed{2}", "2") == 1.0
    assert reward_of(r"\boxed{1} \boxed{2}", "2", strict_single_box=True) == 0.0
    assert reward_of(r"<think>\boxed{1}</think>\boxed{2}", "2", strict_single_box=True) == 1.0
    assert reward_of("The answer is 2", "2", strict_single_box=True) == 0.0


def test_an_answer_inside_the_thinking_does_not_count() -> None:
    assert reward_of(r"<think>\boxed{2}</think> I do not know.", "2") == 0.0
    assert reward_of(r"<think>\boxed{2}", "2") == 0.0


def test_a_list_of_golds_accepts_each() -> None:
    for prediction, reward in (("0.25", 1.0), ("one quarter", 1.0), ("0.3", 0.0)):
        assert reward_of(f"\\boxed{{{prediction}}}", ["1/4", "one quarter"]) == reward


def test_info_shows_what_was_compared() -> None:
    score = resolve("math_answer")(r"\boxed{5}", "2 + 4\n#### 6")
    assert score.info == {"extracted": "5", "gold": "6"}


BOMBS = ["9^{9^{9^{9}}}", "9^9^9", "10000000!", "9^{999999999}", "2^{{9}^{9}}", "((9!)!)!!", "(9^{9999})^{9999}"]
BOMBS += [
    "(10000000)!",
    r"\binom{99999999}{44444444}",
    "\\Gamma(10^{9})",
    "(10^9)!",
    "e^{e^{e^{e^{e}}}}",
    "(x+1)^{2000}",
    "(" * 300 + "x" + ")" * 300,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:20])
def test_numbers_too_large_to_evaluate_are_wrong_at_once(bomb: str) -> None:
    assert not is_tame(normalize(bomb))
    started = time.perf_counter()
    assert reward_of(f"\\boxed{{{bomb}}}", "9") == 0.0
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "answer",
    ["e^{x^2}", "2^{10}", "2^{2^n}", "3^2+4^2", "5!", "x^{-1}", "10^{100}", r"(\frac{2}{3})^{2024}", "x^{a^2+b^2}"],
)
def test_ordinary_powers_are_tame(answer: str) -> None:
    assert is_tame(answer)


@pytest.mark.parametrize(
    ("prediction", "strict", "lenient"),
    [
        (r"17 \cdot 24", 0.0, 1.0),
        (r"17 \times 24", 0.0, 1.0),
        ("17*24", 0.0, 1.0),
        ("400 + 8", 0.0, 1.0),
        ("410 - 2", 0.0, 1.0),
        (r"408 \pm 0", 0.0, 1.0),
        (r"\sum_{i=1}^{2} 136 i", 0.0, 1.0),
        (r"x = 17 \cdot 24", 0.0, 1.0),
        (r"17 \cdot 24 = 408", 1.0, 1.0),
        (r"4.08 \times 10^2", 1.0, 1.0),
        (r"40800 \cdot 10^{-2}", 1.0, 1.0),
        ("x = 408", 1.0, 1.0),
        (r"\frac{816}{2}", 1.0, 1.0),
        (r"\sqrt{166464}", 1.0, 1.0),
    ],
)
def test_a_number_is_not_given_by_repeating_the_question(prediction: str, strict: float, lenient: float) -> None:
    assert reward_of(f"\\boxed{{{prediction}}}", "408") == strict
    assert reward_of(f"\\boxed{{{prediction}}}", "408", allow_unevaluated=True) == lenient


def test_a_sum_is_an_answer_if_the_gold_is_not_a_number() -> None:
    assert reward_of(r"\boxed{1 + \sqrt{2}}", r"\sqrt{2} + 1") == 1.0
    assert reward_of(r"\boxed{x \cdot (x - 1)}", "x^2 - x") == 1.0


# --- real data --------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        pytest.skip(f"no {file.name} beside this checkout")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_gsm8k_golds_equal_themselves_and_not_their_successors(shared_data: Path) -> None:
    rows = read(shared_data / "gsm8k" / "test.jsonl")
    assert len(rows) == 1319
    for row in rows:
        number = row["answer"].split("####")[1].strip()
        assert reward_of(f"\\boxed{{{number}}}", row["answer"]) == 1.0
        assert reward_of(f"\\boxed{{{number.replace(',', '')}}}", row["answer"]) == 1.0
        assert reward_of(f"The answer is ${number}.", row["answer"]) == 1.0
        assert reward_of(f"\\boxed{{{int(number.replace(',', '')) + 1}}}", row["answer"]) == 0.0
        assert reward_of(row["answer"], row["answer"]) == 1.0


def test_math500_golds_equal_themselves(shared_data: Path) -> None:
    rows = read(shared_data / "math" / "math500.jsonl")
    assert len(rows) == 500
    for row in rows:
        assert reward_of(f"\\boxed{{{row['answer']}}}", row["answer"]) == 1.0
        assert reward_of(row["solution"], row["solution"]) == 1.0


def test_math500_golds_differ_from_their_neighbors(shared_data: Path) -> None:
    """Compare a sample of unequal pairs by math-verify and by ours."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(answer: str) -> list[object]:
        return parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)

    answers = [row["answer"] for row in read(shared_data / "math" / "math500.jsonl")][SEED % 5 :: 5]
    for gold, other in itertools.pairwise(answers):
        ours = equals_gold(other, gold_answers(gold))
        assert ours == bool(verify(parsed(gold), parsed(other), timeout_seconds=None)), (gold, other)


@pytest.mark.slow
def test_math_verify_agrees_with_every_no_given_without_it(shared_data: Path) -> None:
    """Math-verify also refuses every pair that is refused because its values differ."""
    from math_verify import verify

    answers = [row["answer"] for row in read(shared_data / "math" / "math500.jsonl")]
    chosen = random.Random(SEED)
    golds = [normalize(answer) for answer in answers if not re.fullmatch(r"-?[\d,.]+", answer)]
    num_refused = 0
    for _ in range(300):
        gold = chosen.choice(golds)
        changed = re.sub(r"\d", lambda digit: chosen.choice([digit.group(), str(chosen.randrange(1, 10))]), gold)
        parsed = [parse(gold), parse(chosen.choice([changed, f"-{gold}", f"{gold} + 0", chosen.choice(golds)]))]
        if all(parsed) and surely_differ(parsed[0][0], parsed[1][0]):
            num_refused += 1
            assert not verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None), parsed
    assert num_refused > 30


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("x", "y"),
        ("5\\%", "0.06"),
        ("0.333333", "1/3"),
        ("2\\sqrt{2}", "2.828427"),
        ("x(x+1)", "x^2+x"),
        ("1", "\\infty"),
    ],
)
def test_special_rules_of_math_verify_are_left_to_it(gold: str, prediction: str) -> None:
    assert not surely_differ(parse(gold)[0], parse(prediction)[0])


# --- any text ---------------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.characters(), max_size=300) | st.text(
    alphabet=r"\boxed{}$#01/.,^ answeris<think>&", max_size=200
)


@hypothesis_seed(SEED)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEXT)
def test_extraction_survives_any_text(text: str) -> None:
    found = extract_answer(text)
    assert found.answer is None or 0 < len(found.answer) <= 1000
    answered = without_thinking(text)
    assert found.num_boxes == answered.count("\\boxed") + answered.count("\\fbox")


@hypothesis_seed(SEED)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(alphabet=st.characters(), max_size=40))
def test_scoring_survives_any_answer(text: str) -> None:
    assert reward_of(f"\\boxed{{{text}}}", "1234567") == 0.0 or any(c.isdigit() for c in text)
    assert reward_of(r"\boxed{12345}", text) in (0.0, None) or "12345" in text


@hypothesis_seed(SEED)
@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-9999, max_value=9999, max_denominator=999), st.integers(0, 3))
def test_every_way_to_write_a_number_is_the_same_number(value: Fraction, way: int) -> None:
    top, bottom = value.numerator, value.denominator
    whole, rest = divmod(abs(top), bottom)
    sign = "-" if top < 0 else ""
    mixed = f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}" if whole and rest else f"{top}/{bottom}"
    written = [f"{top}/{bottom}", f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}", mixed, f"{top * 7}/{bottom * 7}"][way]
    assert equals_gold(written, [f"{top}/{bottom}"]) is True
    assert equals_gold(written, [f"{top + bottom}/{bottom}"]) is False


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10_000_000,
        "\\boxed{" * 1_400_000,
        "\\boxed{" + "{" * 10_000_000,
        "\\boxed{" + "1" * 10_000_000 + "}",
        "1," * 5_000_000,
        "1" * 10_000_000,
        " " * 10_000_000 + "answer is" + " " * 1000,
        "answer is " * 1_000_000,
        "<think>" * 1_400_000,
        "#### " * 2_000_000,
        "\x00" * 10_000_000,
        "\ud800" * 5_000_000,
        "\\" * 10_000_000,
        "$" * 10_000_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_ten_megabytes_are_read_in_linear_time(text: str) -> None:
    started = time.perf_counter()
    assert reward_of(text, "7") == 0.0
    assert time.perf_counter() - started < 3


def test_the_last_box_of_ten_megabytes_is_found() -> None:
    assert last_box("\\boxed{1}" * 1_000_000 + "\\boxed{7}" + " " * 1_000_000) == "7"
