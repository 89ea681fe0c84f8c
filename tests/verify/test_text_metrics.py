"""Metrics of code completion against other implementations and values computed by hand."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.verify.checks.text import code_exact_match, edit_similarity, sentence_bleu, without_placeholders

WORDS = st.text("ab c=", max_size=12)
TOKENS = st.lists(st.integers(0, 4), max_size=12)


def longest_common_subsequence(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return row[-1]


@given(WORDS, WORDS)
def test_edit_similarity_is_the_share_of_characters_kept(prediction: str, reference: str) -> None:
    a, b = prediction.strip(), reference.strip()
    expected = 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a or b else 1.0
    assert edit_similarity(prediction, reference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pair", [("return len(x)", "return sum(x)"), ("a = b", "a = b"), ("", "x"), ("abc", "xyz")])
def test_edit_similarity_equals_difflib_if_difflib_finds_the_best_alignment(pair: tuple[str, str]) -> None:
    assert edit_similarity(*pair) == pytest.approx(SequenceMatcher(None, *pair, autojunk=False).ratio())


def test_placeholders_are_read_as_codexglue_reads_them() -> None:
    code = 'open ( <STR_LIT:a.txt> , "<STR_LIT>" , <NUM_LIT> , <NUM_LIT:10> ) + <CHAR_LIT:x> <EOL>'
    assert without_placeholders(code) == 'open ( a.txt , "" , 0 , 10 ) + x <EOL>'
    assert code_exact_match("f( <NUM_LIT> )", " f(  0\n)") == 1.0
    assert code_exact_match("f(0)", "f( 0 )") == 0.0
    assert edit_similarity("<NUM_LIT:7>\n", "7") == 1.0


@given(TOKENS, TOKENS.filter(bool))
def test_bleu_is_that_of_sacrebleu(prediction: list[int], reference: list[int]) -> None:
    from sacrebleu.metrics import BLEU

    oracle = BLEU(tokenize="none", smooth_method="add-k", smooth_value=1, effective_order=False)
    expected = oracle.sentence_score(" ".join(map(str, prediction)), [" ".join(map(str, reference))]).score / 100
    assert sentence_bleu(prediction, reference) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_the_same_tokens_is_1_and_of_none_0() -> None:
    assert sentence_bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == pytest.approx(1.0)
    assert sentence_bleu([], [1]) == 0.0
