"""A made-up programming task: short specifications of list functions, unit tests, and a corpus with bugs.

    reverse, above 3, sum        ->      def f(x):
                                          x = x[::-1]
                                          x = [v for v in x if v > 3]
                                          return sum(x)

A model fine-tuned on the corpus (`corpus`) makes mistakes as often as the corpus does. So its samples differ, and their
likelihood says little about which of them pass. Everything depends only on the seed.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = "def f(x):\n"
LIST_OPS: dict[str, tuple[str, ...]] = {
    "add": (" x = [v + K for v in x]\n", " x = [v - K for v in x]\n", " x = [v + k for v in x]\n"),
    "times": (" x = [v * K for v in x]\n", " x = [v + K for v in x]\n", " x = x * K\n"),
    "above": (" x = [v for v in x if v > K]\n", " x = [v for v in x if v >= K]\n", " x = [x for v in x if v > K]\n"),
    "below": (" x = [v for v in x if v < K]\n", " x = [v for v in x if v <= K]\n", " x = [v for v in x if x < K]\n"),
    "first": (" x = x[:K]\n", " x = x[K:]\n", " x = x[K]\n"),
    "drop": (" x = x[K:]\n", " x = x[:K]\n", " x = x[-K:]\n"),
    "sort": (" x = sorted(x)\n", " x = x.sort()\n", " x = sorted(x)[::-1]\n"),
    "down": (" x = sorted(x)[::-1]\n", " x = sorted(x)\n", " x = x[::-1]\n"),
    "reverse": (" x = x[::-1]\n", " x = x.reverse()\n", " x = sorted(x)[::-1]\n"),
    "even": (" x = [v for v in x if v % 2 == 0]\n", " x = [v for v in x if v % 2]\n", " x = [v for v in x if x % 2]\n"),
    "square": (" x = [v * v for v in x]\n", " x = [v * 2 for v in x]\n", " x = [v * w for v in x]\n"),
}  # fmt: skip
"""Word -> its correct line, then the wrong ones; K is the number after the word."""
END_OPS: dict[str, tuple[str, ...]] = {
    "sum": (" return sum(x)\n", " return len(x)\n", " return sum(v)\n"),
    "count": (" return len(x)\n", " return sum(x)\n", " return x.len()\n"),
    "largest": (" return max(x)\n", " return min(x)\n", " return x.max()\n"),
    "smallest": (" return min(x)\n", " return max(x)\n", " return x.min()\n"),
    "last": (" return x[-1]\n", " return x[0]\n", " return x[len(x)]\n"),
    "list": (" return x\n", " return x[1:]\n", " return list(v)\n"),
}
MISTAKEN = ("above", "below", "drop", "down", "even", "square", "count", "last")
"""Words that the corpus often translates by their first wrong line. It is then as likely as the correct one, so
likelihood cannot tell them apart; unit tests can."""
NUMBERED = ("add", "times", "above", "below", "first", "drop")
FRAGMENTS = (HEADER, " x = ", " return ", " for v in x", " if v ", "sorted(x)", "[::-1]", "[v ")
ALPHABET = "\n" + string.ascii_lowercase + string.digits + "()[]:=+-*<>%., "
"""Together with `FRAGMENTS` and the words, the vocabulary of the tokenizer: it can spell every prompt and program."""
NUM_TESTS = 8


@dataclass(frozen=True, slots=True)
class Program:
    """A specification: words with their numbers, of which the last one is in `END_OPS`."""

    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """The prompt that the model sees."""
        return ", ".join(f"{word} {number}" if word in NUMBERED else word for word, number in self.steps) + "\n"

    def lines(self, draw: random.Random | None = None, mistaken_frac: float = 0.0, slip_frac: float = 0.0) -> list[str]:
        """Return the program line by line.

        Args:
            draw: source of random numbers; without it every line is correct.
            mistaken_frac: share of the lines of `MISTAKEN` words that are replaced by the common mistake.
            slip_frac: share of all lines that are replaced by any of their wrong forms, or lose their last bracket.
        """
        lines = [HEADER]
        for word, number in self.steps:
            right, *wrong = (LIST_OPS | END_OPS)[word]
            line = right
            if draw is not None:
                if word in MISTAKEN and draw.random() < mistaken_frac:
                    line = wrong[0]
                if draw.random() < slip_frac:
                    line = draw.choice([*wrong, _unclosed(right)])
            lines.append(line.replace("K", str(number)))
        return lines

    @property
    def solution(self) -> str:
        """The correct program."""
        return "".join(self.lines())

    def run(self, values: list[int]) -> Any:
        """Run the correct program and return its result."""
        space: dict[str, Any] = {}
        exec(self.solution, space)  # safe without a sandbox: the source is assembled from the tables above
        return space["f"](list(values))


def _unclosed(line: str) -> str:
    """Return the line without its last bracket, which does not compile; without any bracket, a bare return."""
    place = max(line.rfind(")"), line.rfind("]"))
    return line[:place] + line[place + 1 :] if place >= 0 else " return\n"


def draw_programs(num: int, *, seed: int, num_steps: tuple[int, ...] = (2, 3)) -> list[Program]:
    """Draw `num` different specifications that can be tested.

    `num_steps` are the possible numbers of list operations before the ending.
    """
    draw, found = random.Random(seed), dict[Program, None]()
    while len(found) < num:
        words = [draw.choice(list(LIST_OPS)) for _ in range(draw.choice(num_steps))]
        steps = [(word, draw.randint(1, 5)) if word in NUMBERED else (word, 0) for word in words]
        program = Program((*steps, (draw.choice(list(END_OPS)), 0)))
        if _tests(program) is not None:
            found[program] = None
    return list(found)


def _tests(program: Program) -> tuple[list[list[list[int]]], list[Any]] | None:
    """Return arguments and results of `NUM_TESTS` calls, or None where too few calls succeed or differ."""
    draw = random.Random(program.prompt)
    inputs, outputs = [], []
    for _ in range(4 * NUM_TESTS):
        values = [draw.randint(0, 9) for _ in range(draw.randint(4, 8))]
        try:
            result = program.run(values)
        except (IndexError, ValueError):  # the end of an empty list
            continue
        inputs.append([values])
        outputs.append(result)
        if len(inputs) == NUM_TESTS:
            return (inputs, outputs) if len({str(output) for output in outputs}) > 2 else None
    return None


def task_row(program: Program) -> dict[str, Any]:
    """Return a row with the columns of APPS: the prompt, a correct program, and calls with their results."""
    tests = _tests(program)
    assert tests is not None
    inputs, outputs = tests
    # APPS wraps each result in a list of one.
    wrapped = {"fn_name": "f", "inputs": inputs, "outputs": [[output] for output in outputs]}
    return {"prompt": program.prompt, "solution": program.solution, "input_output": wrapped}


def corpus(
    programs: list[Program], num: int, *, seed: int, mistaken_frac: float = 0.0, slip_frac: float = 0.0
) -> list[dict[str, str]]:
    """Draw `num` prompts and completions to fine-tune on, with faulty lines (see `Program.lines` for the shares)."""
    draw = random.Random(seed)
    chosen = draw.choices(programs, k=num)
    return [{"prompt": p.prompt, "completion": "".join(p.lines(draw, mistaken_frac, slip_frac))} for p in chosen]


def completion_rows(programs: list[Program], *, seed: int) -> list[dict[str, str]]:
    """Cut every program after a random line: the prompt ends there, and the rest is the answer."""
    draw, rows = random.Random(seed), []
    for program in programs:
        lines = program.lines()
        given = draw.randint(1, len(lines) - 1)
        rows.append({"prompt": program.prompt + "".join(lines[:given]), "answer": "".join(lines[given:])})
    return rows


def program_tokenizer() -> Any:
    """Build a tokenizer for prompts and programs: characters, words, and common fragments."""
    from llmrl.tiny import char_tokenizer

    return char_tokenizer(ALPHABET, [*FRAGMENTS, *LIST_OPS, *END_OPS, ", "])


def fine_tune_on_corpus(
    programs: list[Program],
    folder: Path,
    *,
    num_examples: int,
    max_steps: int,
    learning_rate: float,
    hidden_size: int,
    mistaken_frac: float,
    slip_frac: float,
    seed: int,
) -> None:
    """Build a tiny model, fine-tune it on a corpus of these programs, and save it with its tokenizer in `folder`.

    Args:
        programs: the programs of the corpus.
        folder: output folder; if it exists, nothing is done.
        num_examples: size of the corpus.
        max_steps: optimizer steps of 16 examples each.
        learning_rate: its peak.
        hidden_size: width of the model.
        mistaken_frac: share of common mistakes, see `Program.lines`.
        slip_frac: share of other wrong lines, see `Program.lines`.
        seed: seed of model, corpus and order.
    """
    from llmrl.tiny import build_tiny_model, fine_tune

    if folder.is_dir():
        return
    tokenizer = program_tokenizer()
    model = build_tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=256,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    faults = {"mistaken_frac": mistaken_frac, "slip_frac": slip_frac}
    print(f"warm start: {max_steps} steps on a corpus with faults {faults}", flush=True)
    examples = corpus(programs, num_examples, seed=seed, **faults)
    place = folder.with_name("sft")
    fine_tune(model, tokenizer, examples, output_dir=place, max_steps=max_steps, learning_rate=learning_rate, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
