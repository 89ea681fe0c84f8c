"""Suite verify: the verifiers against their usual alternatives, and generation with and without verification.

python -m benchmarks.verify SIDE CASE SEED OUT      one measurement, in this process
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Meter, compare, measure
from llmrl.engines.base import FakeEngine
from llmrl.rollout.collector import Collector
from llmrl.rollout.options import RolloutConfig
from llmrl.sandbox import Limits
from llmrl.sandbox.local import LocalSandbox
from llmrl.types import Message, RolloutGroup, Sampling, Task
from llmrl.verify.code.check import run_tests
from llmrl.verify.code.rows import read_row
from llmrl.verify.pool import Pool, available_cores
from llmrl.verify.rubric import Rubric

NUM_PROGRAMS = 60
NUM_QUESTIONS = 60
ANSWERS_PER_QUESTION = 8
NUM_PROMPTS, NUM_GENERATIONS = 16, 8
LATENCY_S = (0.5, 4.0)
"""Seconds of a scripted completion, uniform between these."""
MATH_REWARD, CODE_REWARD = "rewards/math_answer.py:math_answer", "rewards/unit_tests.py:unit_tests"


def run(cases: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Measure the named cases in that order. `benchmarks.common.compare` describes an entry of the result.

    Raises:
        RuntimeError: a measurement failed (such as a sandbox that does not work here), or the two sides disagree.
    """
    results = []
    for name in cases:

        def one(side: str, repetition: int, name: str = name) -> dict[str, Any]:
            return measure("benchmarks.verify", side, name, str(repetition))

        result = compare(name, RIVALS[name], one, repetitions=repetitions)
        pairs = zip(result["measurements"]["ours"], result["measurements"]["rival"])
        if any(ours["verdicts"] != theirs["verdicts"] for ours, theirs in pairs):
            raise RuntimeError(f"{name}: the two sides do not give the same verdicts")
        results.append(result)
    return results


def worker(side: str, name: str, seed: str, out: str) -> None:
    """Measure one side once and write the result to `out`; cpu_s and wall_s are per item of the case."""
    found = CASES[name](side == "ours", int(seed))
    Path(out).write_text(json.dumps(found))


def _measured(meter: Meter, num_items: int) -> dict[str, Any]:
    """Return the cost per item between the two marks, and the memory of the process and its living children."""
    found = meter.report(skip=0)
    return {
        "cpu_s": found["cpu_s"] / num_items,
        "wall_s": found["wall_s"] / num_items,
        "memory_mb": found["memory_mb"],
        "items": num_items,
    }


# --- programs ---------------------------------------------------------------------------------------------------------

PROGRAM = """from typing import List
import math


def solve(numbers: List[int]) -> List[int]:
    total = sum(number * {factor} for number in numbers)
    return sorted(numbers) + [total, math.gcd(total, {factor})]
"""


def programs() -> list[tuple[str, list[str]]]:
    """Return small functions, each with three assertions as in a row of MBPP. Every fourth fails its last one."""
    found = []
    for index in range(NUM_PROGRAMS):
        factor = index + 2
        last = 5 * factor + (index % 4 == 3)
        checks = [f"assert solve([3, 1, 2]) == [1, 2, 3, {6 * factor}, {factor}]"]
        checks += [f"assert solve([]) == [0, {factor}]", f"assert solve([5]) == [5, {last}, {factor}]"]
        found.append((PROGRAM.format(factor=factor), checks))
    return found


def unit_tests(kind: str) -> Callable[[bool, int], dict[str, Any]]:
    """Compare a warm sandbox with a new, unsandboxed interpreter per program, with the assertions appended."""

    def measured(ours: bool, seed: int) -> dict[str, Any]:
        meter = Meter()
        if not ours:
            return fresh_interpreters(meter)
        box = LocalSandbox(kind, packages=(), max_servers=1)
        try:
            judge_programs(box)
            meter.mark()
            verdicts = judge_programs(box)
            meter.mark()
            found = _measured(meter, NUM_PROGRAMS)
            found["memory_mb"] += box.run("print()", "", Limits()).memory_mb
        finally:
            box.close()
        return found | {"verdicts": verdicts}

    return measured


def judge_programs(box: LocalSandbox) -> list[bool]:
    """Return whether each program passes all its assertions, in a sandbox."""
    verdicts = []
    for program, checks in programs():
        results = run_tests(program, read_row({"test_list": checks}), box, Limits(), stop_early=True)
        verdicts.append(all(result.verdict == "passed" for result in results))
    return verdicts


def fresh_interpreters(meter: Meter) -> dict[str, Any]:
    """Measure the same with one new `python` per program."""
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        meter.mark()
        for program, checks in programs():
            file.write_text("\n".join([program, *checks]))
            done = subprocess.run([sys.executable, str(file)], capture_output=True, timeout=60)
            verdicts.append(done.returncode == 0)
        meter.mark()
    found = _measured(meter, NUM_PROGRAMS)
    found["memory_mb"] += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return found | {"verdicts": verdicts}


# --- mathematics ------------------------------------------------------------------------------------------------------

ANSWERS: tuple[Callable[[int], str], ...] = (
    lambda n: str(n),
    lambda n: str(7 * n),
    lambda n: f"-{n}",
    lambda n: f"\\frac{{{n}}}{{{2 * n + 1}}}",
    lambda n: f"{n}\\sqrt{{{n + 1}}}",
    lambda n: f"\\left({n}, \\frac{{\\pi}}{{{n + 1}}}\\right)",
    lambda n: f"x^2 + {n}x - {n + 3}",
    lambda n: f"\\frac{{{n} + \\sqrt{{{n + 2}}}}}{{{n + 1}}}",
)
"""Kinds of answers, made from a number. Whole numbers are about as frequent as in competition mathematics."""


def questions(seed: int, start: int = 2) -> list[tuple[str, str]]:
    """Return (completion, gold answer): every question has several answers, about half of them right.

    The numbers are between `start` and `start` + 63.
    """
    random_numbers = random.Random(seed)
    found = []
    for index in range(NUM_QUESTIONS):
        kind, number = ANSWERS[index % len(ANSWERS)], start + random_numbers.randrange(58)
        for _ in range(ANSWERS_PER_QUESTION):
            given = number if random_numbers.random() < 0.5 else number + random_numbers.randrange(1, 6)
            found.append((f"Let us see. So it is $\\boxed{{{kind(given)}}}$.", kind(number)))
    return found


def math_answers(warm_rounds: int) -> Callable[[bool, int], dict[str, Any]]:
    """Compare the pool with math-verify as its documentation calls it, in this process.

    Args:
        warm_rounds: how often both sides answer the same number of questions, with other numbers, before the clock
            starts. The LaTeX parser and sympy keep getting faster for thousands of answers, and a run has more.
    """

    def measured(ours: bool, seed: int) -> dict[str, Any]:
        rounds = [questions(seed, start=100 * (i + 1)) for i in range(warm_rounds)] + [questions(seed)]
        return asyncio.run(pool_verdicts(rounds)) if ours else plain_verdicts(rounds)

    return measured


async def pool_verdicts(rounds: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """Return the last round's cost and verdicts, from worker processes that have loaded math-verify."""
    pool, meter, scores = Pool(available_cores()), Meter(), []
    await pool.warm([MATH_REWARD])
    for work in rounds:
        if work is rounds[-1]:
            meter.mark()
        calls = [pool.call(MATH_REWARD, {"completion": given, "answer": gold}, 20.0) for given, gold in work]
        scores = await asyncio.gather(*calls)
    meter.mark()
    found = _measured(meter, len(scores))  # before the workers end, so that their memory counts
    await pool.close()
    return found | {"verdicts": [score.reward == 1.0 for score in scores]}


def plain_verdicts(rounds: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """Measure the same with parse, parse, verify, with math-verify's own defaults."""
    from math_verify import parse, verify

    verify(parse("$\\boxed{x}$"), parse("$\\boxed{y}$"))  # triggers its lazy imports
    meter, verdicts = Meter(), []
    for work in rounds:
        if work is rounds[-1]:
            meter.mark()
        verdicts = [verify(parse(f"$\\boxed{{{gold}}}$"), parse(given)) for given, gold in work]
    meter.mark()
    return _measured(meter, len(verdicts)) | {"verdicts": verdicts}


# --- overlap ----------------------------------------------------------------------------------------------------------


class CodePoints:
    """A chat whose token ids are code points, so that a scripted engine can return any text."""

    stop_token_ids = (2,)

    def render(self, messages: list[Message]) -> list[int]:
        """Return the token ids of the joined contents."""
        return [ord(character) for message in messages for character in message["content"]]

    def parse(self, completion_ids: list[int]) -> Message:
        """Return the assistant's message."""
        return {"role": "assistant", "content": "".join(chr(i) for i in completion_ids if i != 2)}


def overlap(reward: str) -> Callable[[bool, int], dict[str, Any]]:
    """Compare a step's rollouts with a real verifier and with a reward that costs nothing."""

    def measured(ours: bool, seed: int) -> dict[str, Any]:
        groups, found = asyncio.run(collect(reward, ours, seed))
        rewards = [rollout.score.reward for group in groups for rollout in group.rollouts if rollout.score is not None]
        if ours and set(rewards) != {0.0, 1.0}:
            raise RuntimeError(f"{reward} should accept some of the answers and refuse some; it gave {rewards}")
        return found | {"verdicts": len(rewards)}

    return measured


async def collect(reward: str, verified: bool, seed: int) -> tuple[list[RolloutGroup], dict[str, Any]]:
    """Collect all rollouts of one step, from an engine that takes time but no processor, as on another machine.

    Every request has a latency drawn from its own seed, so both sides wait equally long. Returns groups and cost.
    """
    tasks, texts = math_tasks(seed) if reward == MATH_REWARD else code_tasks()

    def script(prompt_ids: list[int], sampling: Sampling) -> list[int]:
        answers = texts["".join(map(chr, prompt_ids))]
        return [*map(ord, answers[sampling.seed % len(answers)]), 2]

    engine = FakeEngine(script, latency=lambda _, sampling: random.Random(sampling.seed).uniform(*LATENCY_S))
    rubric = Rubric([reward if verified else nothing], num_workers=available_cores())
    config = RolloutConfig(num_prompts=NUM_PROMPTS, num_generations=NUM_GENERATIONS, max_completion_length=4096)
    collector = Collector(engine, CodePoints(), rubric, config, seed=seed)  # pyright: ignore[reportArgumentType]
    try:
        await rubric.warm()
        await collector.collect(tasks[:1], [0])  # sandboxes start with the first program
        meter = Meter()
        meter.mark()
        groups = await collector.collect(tasks, list(range(NUM_PROMPTS)))
        meter.mark()
        return groups, _measured(meter, 1)
    finally:
        await rubric.close()


def nothing(completion: str) -> float:
    """Return 0 without any verification."""
    return 0.0


def math_tasks(seed: int) -> tuple[list[Task], dict[str, list[str]]]:
    """Return tasks, and the completions that the engine gives for each prompt."""
    work = questions(seed)
    tasks, texts = [], {}
    for index in range(NUM_PROMPTS):
        answers = work[index * ANSWERS_PER_QUESTION : (index + 1) * ANSWERS_PER_QUESTION]
        prompt = f"question {index}"
        tasks.append(Task(id=prompt, messages=[{"role": "user", "content": prompt}], answer=answers[0][1]))
        texts[prompt] = [given for given, _ in answers]
    return tasks, texts


def code_tasks() -> tuple[list[Task], dict[str, list[str]]]:
    """Return the same with programs. The completion of each prompt is its own program."""
    tasks, texts = [], {}
    for index, (program, checks) in enumerate(programs()[:NUM_PROMPTS]):
        prompt = f"program {index}"
        meta = {"test_list": checks}
        tasks.append(Task(id=prompt, messages=[{"role": "user", "content": prompt}], meta=meta))
        texts[prompt] = [f"```python\n{program}```"]
    return tasks, texts


CASES: dict[str, Callable[[bool, int], dict[str, Any]]] = {
    "unit_tests_bwrap": unit_tests("bwrap"),
    "unit_tests_lite": unit_tests("lite"),
    "math_answers": math_answers(warm_rounds=2),
    "math_answers_cold": math_answers(warm_rounds=0),
    "overlap_math": overlap(MATH_REWARD),
    "overlap_unit_tests": overlap(CODE_REWARD),
}
"""Functions of (whether it is llmrl's side, seed) that return cpu_s, wall_s, memory_mb and verdicts."""
RIVALS = {
    "unit_tests_bwrap": "one new python per program, no sandbox",
    "unit_tests_lite": "one new python per program, no sandbox",
    "math_answers": "plain math-verify calls in one process",
    "math_answers_cold": "the same, in processes that have answered nothing before",
    "overlap_math": "generation alone",
    "overlap_unit_tests": "generation alone",
}


if __name__ == "__main__":
    worker(*sys.argv[1:])
