"""The made-up programs are correct or faulty as intended, and their tokenizer can spell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrl.verify.code.rows import read_row
from llmrl.verify.spec import load_file

programs_file = load_file(Path(__file__).resolve().parents[2] / "recipes" / "programs.py")
END_OPS, LIST_OPS, MISTAKEN = programs_file.END_OPS, programs_file.LIST_OPS, programs_file.MISTAKEN
HEADER, Program = programs_file.HEADER, programs_file.Program
completion_rows, corpus, draw_programs = (
    programs_file.completion_rows,
    programs_file.corpus,
    programs_file.draw_programs,
)
program_tokenizer, task_row = programs_file.program_tokenizer, programs_file.task_row


def test_a_program_by_hand() -> None:
    program = Program((("above", 3), ("times", 2), ("sum", 0)))
    assert program.prompt == "above 3, times 2, sum\n"
    assert program.solution == "def f(x):\n x = [v for v in x if v > 3]\n x = [v * 2 for v in x]\n return sum(x)\n"
    assert program.run([1, 4, 3, 9]) == 2 * (4 + 9)


def test_rows_carry_tests_that_the_solution_passes(seed: int) -> None:
    for program in draw_programs(30, seed=seed):
        row = task_row(program)
        tests = read_row(row).tests
        assert tests is not None
        assert [[program.run(*arguments)] for arguments in tests.inputs] == tests.outputs  # type: ignore[union-attr]


def test_programs_differ_and_depend_on_the_seed_alone(seed: int) -> None:
    drawn = draw_programs(50, seed=seed)
    assert len(set(drawn)) == 50
    assert drawn == draw_programs(50, seed=seed) != draw_programs(50, seed=seed + 1)


def test_mistakes_of_the_corpus(seed: int) -> None:
    programs = draw_programs(40, seed=seed)
    solutions = {program.prompt: program.solution for program in programs}
    clean = corpus(programs, 50, seed=seed)
    assert all(row["completion"] == solutions[row["prompt"]] for row in clean)
    wrong = corpus(programs, 50, seed=seed, mistaken_frac=1.0)
    for row in wrong:
        mistaken = any(word in row["prompt"] for word in MISTAKEN)
        assert (row["completion"] != solutions[row["prompt"]]) == mistaken
    assert any(row["completion"] != solutions[row["prompt"]] for row in corpus(programs, 50, seed=seed, slip_frac=0.5))


def test_prompts_and_answers_of_completions_are_the_program(seed: int) -> None:
    programs = draw_programs(40, seed=seed)
    rows = completion_rows(programs, seed=seed)
    assert rows == completion_rows(programs, seed=seed)
    for program, row in zip(programs, rows, strict=True):
        assert row["prompt"] + row["answer"] == program.prompt + program.solution
        assert row["prompt"].startswith(program.prompt + HEADER) and row["answer"].strip()
    assert len({row["prompt"].count("\n") for row in rows}) > 1


@pytest.mark.parametrize("word", [*LIST_OPS, *END_OPS])
def test_every_form_of_a_line_is_spelled_by_the_tokenizer(word: str) -> None:
    tokenizer = program_tokenizer()
    for line in (LIST_OPS | END_OPS)[word]:
        text = line.replace("K", "4")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
