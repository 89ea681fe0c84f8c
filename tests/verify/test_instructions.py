"""IFEval's instructions: each id on texts that follow it and texts that do not."""

from __future__ import annotations

from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.verify.checks.ifbench import IFBENCH_CHECKS
from llmrl.verify.checks.instructions import CHECKS, MORE_CHECKS, follows
from llmrl.verify.checks.text_parts import sentences
from llmrl.verify.spec import resolve

ENGLISH = "the quick brown fox jumps over the lazy dog and then it sleeps for a very long time"
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["tea", "c++"]}, ["TEA and c++"], ["tea", "c+ tea"]),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, ["a a", "aa"], ["a"]),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, ["a", "b"], ["aA"]),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, ["steam", "coffee"], ["Tea."]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, ["eE"], ["e"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein sehr langer deutscher Satz."], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["A b. C d!"],
        ["Dr. B is 3.5"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b ***"],
        ["a\n\nb", "a******b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a\n\nthen, b", "a\n\n'Then' b"],
        ["then\n\na", "a\n\nthen\n\nc", "a"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[a]", "[a"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP.S. y", "p. s. y"], ["PS y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S y"], ["P.S. y"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b"], ["* a", "* a\n* b\n- c"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["No.", "my answer is maybe"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* **b**", "*a* *b*"],
        ["*a*", "** **"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1 a SECTION 2 b"],
        ["SECTION 1", "SECTION one SECTION two"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```"], ["{a: 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<A day>> text"], ["<A day>", "<<>>", "<< >>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. Done"], ["Done. Say it."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"x the end."'], ["The end. x"]),
    ("startend:quotation", {}, ['"a"'], ['"a', '"', "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NO WAY man"],
        ["No Way", "NO way"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "DAS IST EIN SEHR LANGER DEUTSCHER SATZ"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.title()]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
    ("punctuation:punctuation_dot", {}, ["a"], ["a."]),
    ("punctuation:punctuation_exclamation", {}, ["a"], ["a!"]),
    ("keywords:word_once", {"keyword": "tea"}, ["Tea, steam"], ["tea tea", "steam"]),
    ("first_word:first_word_answer", {"first_word": "Well"}, ["well, no"], ["no, well"]),
    ("first_word:first_word_sent", {"first_word": "we"}, ["We go. We stay."], ["We go. They stay."]),
    ("last_word:last_word_answer", {"last_word": "end"}, ["the end."], ["end of"]),
    ("last_word:last_word_sent", {"last_word": "so"}, ["I say so. Is it so?"], ["So it is."]),
    ("letters:letter_counting", {"N": 3, "relation": "at least"}, ["abc"], ["ab1"]),
    ("count:lowercase_counting", {"N": 1}, ["One TWO three"], ["one two"]),
    ("count:count_unique", {}, ["one two"], ["one One"]),
    ("paragraphs:paragraphs", {}, ["a *** b"], ["a"]),
    ("paragraphs:paragraphs2", {}, ["a\n\nb"], ["a\nb"]),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, ["a b", "a b c"], ["a", "a b c d"]),
    ("count:unique_word_count", {"N": 2}, ["one two", "One, two one"], ["one One, one."]),
    ("count:numbers", {"N": 2}, ["1,000 and 2.5"], ["1", "1 2 3"]),
    ("count:punctuation", {}, ["a. b, c! d? e; f: g?!"], ["a. b, c! d? e; f: g", "a. b, c? e; f: g?!"]),
    ("count:conjunctions", {"small_n": 2}, ["a and b, or c"], ["a and b and c"]),
    ("count:pronouns", {"N": 3}, ["She/her and It."], ["she and her"]),
    (
        "count:keywords_multiple",
        dict(zip(("keyword1", "keyword2", "keyword3", "keyword4", "keyword5"), "vwxyz")),
        ["V ww xxx yyyyy zzzzzzz"],
        ["v w xxx yyyyy zzzzzzz"],
    ),
    ("words:palindrome", {}, ["level " * 10, "Level, radar. " * 5], ["level " * 9, "abba " * 10]),
    ("words:prime_lengths", {}, ["It was not.", "to see trees"], ["This one", "a bee"]),
    ("words:repeats", {"small_n": 1}, ["a b"], ["a b A."]),
    ("words:last_first", {}, ["I see you. You see me."], ["I see you. We go."]),
    ("words:no_consecutive", {}, ["a big apple"], ["big bad"]),
    ("words:alphabet", {}, ["A big cat", "yes zebra and"], ["A cat", "1 big cat"]),
    ("words:vowel", {}, ["a bed in it"], ["a bed is out", "a\nb"]),
    ("words:consonants", {}, ["this string"], ["this is"]),
    ("words:paragraph_last_first", {}, ["a b a.\n\nc c"], ["a b", "a a\nb c"]),
    ("sentence:keyword", {"word": "tea", "N": 2}, ["No. Tea is."], ["Tea. No.", "Tea."]),
    (
        "sentence:increment",
        {"small_n": 1},
        ["One. Two two. Three three three."],
        ["One. Two.", "One. Three three three."],
    ),
    ("format:parentheses", {}, ["([{([x])}])"], ["((((x))))", "(((((x"]),
    ("format:quotes", {}, ['"a \'b "c" d\' e"'], ["\"a 'b' c\""]),
    ("format:quote_unquote", {}, ['"a" is a letter.'], ['He says "a".', '"a" "b" c']),
    ("format:newline", {}, ["a\nb", "a\n\nb"], ["a b"]),
    ("format:list", {"sep": "..."}, ["...a\n...b"], ["...a"]),
    ("format:no_whitespace", {}, ["a-b"], ["a b", "a\tb"]),
    ("format:output_template", {}, ["My Answer: a My Conclusion: b Future Outlook: c"], ["My Answer: a"]),
    ("format:options", {"options": ["Yes", "No."]}, ["yes", "No"], ["Yes and no", "maybe"]),
    ("format:options", {"options": "yes/no/maybe"}, ["Maybe."], ["yes/no"]),
    ("format:thesis", {}, ["<i>So.</i> Because", "<em>So.</em> x"], ["<i></i> x", "<i>So.</i>", "So."]),
    ("copy:copy", {"prompt_to_repeat": "Say it."}, ["say it."], ["Say it. Done"]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_each_instruction(name: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not follows(text, name, arguments)] == []
    assert [text for text in bad if follows(text, name, arguments)] == []


def test_every_id_has_a_case_and_refuses_an_empty_response() -> None:
    assert {case[0] for case in CASES} == set(CHECKS) | set(MORE_CHECKS) | set(IFBENCH_CHECKS)
    assert len(CHECKS) == 25
    for name, arguments, _, _ in CASES:
        assert not follows(" \n", name, arguments)
        assert not follows("", name, arguments, loose=True)


def test_loose_leaves_out_a_line_or_the_asterisks() -> None:
    last = {"end_phrase": "bye"}
    assert follows("So:\nbye\n\nI hope it helps.", "startend:end_checker", last, loose=True)
    assert not follows("So:\nbye\nI hope\nit helps.", "startend:end_checker", last, loose=True)
    assert follows("**bye**", "startend:end_checker", last, loose=True)
    assert not follows("**bye**", "startend:end_checker", last)


def test_sentences() -> None:
    assert sentences("Dr. Smith paid 3.50 e.g. twice. Why? \u597d\u3002\u597d\u3002") == [
        "Dr. Smith paid 3.50 e.g. twice.",
        "Why?",
        "\u597d\u3002",
        "\u597d\u3002",
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "'no:such' is unknown"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "missing 1 required positional argument"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "1 instruction ids and 0 kwargs"),
        ({}, "0 instruction ids"),
        ({"ground_truth": "[{"}, "is not JSON"),
    ],
)
def test_a_row_that_cannot_be_checked_is_named(row: dict[str, Any], text: str) -> None:
    import rewards.instruction_following as module

    assert text in (module.check(row) or "")
    with pytest.raises(UserError, match="instruction_following"):
        resolve("instruction_following")("a", **row)
