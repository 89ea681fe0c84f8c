"""`llmrl verify`: scores stored completions, or checks the examples of rewards. It needs no model."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import Interrupted, LlmrlError, RunFailed, UserError
from llmrl.types import Rollout, RolloutGroup, Score
from llmrl.verify.contract import ExampleResult, gold_and_nothing, run_examples
from llmrl.verify.partial import PartialFile
from llmrl.verify.pool import available_cores
from llmrl.verify.redteam.command import MakeProposer, add_options, check_options, red_team
from llmrl.verify.reward_args import ARGS_HELP, AddArgs, AddReward, AddTarget, parts_of, with_dotted
from llmrl.verify.rows import is_conversational, read_rows, result_line, row_key, row_to_rollout
from llmrl.verify.rubric import RowError, Rubric

PROGRESS_EVERY_S = 10.0
"""Seconds between progress lines when stderr is not a terminal."""

DESCRIPTION = (
    "Score stored completions. Input: one JSON object per line with `completion` (text or messages) and the columns "
    "that the rewards name. Output: the same rows in the same order with `reward` (null: not judged), `parts`, `info` "
    "and `error`. Consecutive rows that differ in nothing but their completion form one group."
)


def run(argv: list[str], make_proposer: MakeProposer | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: its arguments.
        make_proposer: loads the model that a red team attacks with.

    Returns:
        0: done. 1: a reward raised, nothing was scored, an example failed, or the red team found something that pays.
        2: the arguments or the input are wrong.
    """
    try:
        arguments = _parse(argv)
        if arguments.red_team:
            return asyncio.run(_red_team(arguments, make_proposer))
        if arguments.self_test:
            return asyncio.run(_self_test(arguments.reward, arguments.num_workers))
        return asyncio.run(_verify(arguments))
    except LlmrlError as error:
        print(f"llmrl verify: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"llmrl verify: {str(stop) or 'interrupted'}{_how_to_go_on(argv)}", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 130


def _how_to_go_on(argv: list[str]) -> str:
    """Return where the finished rows of a command that was stopped are, if it scored a file."""
    words = [word for word in argv if word.startswith("--output=")]
    output = words[0].partition("=")[2] if words else argv[argv.index("--output") + 1] if "--output" in argv else ""
    partial = Path(f"{output}.partial")
    return f"; finished rows are in {partial}, and the same command goes on from there" if partial.is_file() else ""


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmrl verify", description=DESCRIPTION)
    parser.add_argument("--reward", action=AddReward, metavar="SPEC", help="repeat it to add several up")
    parser.add_argument(
        "--red_team",
        "--red-team",
        action=AddTarget,
        metavar="SPEC",
        help="attack this reward with known exploits on the rows of --input; --output gets the report as JSON",
    )
    parser.add_argument("--args", action=AddArgs, metavar="MAPPING", help=ARGS_HELP)
    parser.add_argument("--time_limit_s", type=float, help="limit of one call of a reward, in seconds")
    parser.add_argument("--input", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--output", type=Path, metavar="SCORES.jsonl")
    parser.add_argument("--num_workers", type=int, default=available_cores(), help="default: all cores")
    parser.add_argument("--answer_column", help="default: the first of answer, solution, target")
    parser.add_argument(
        "--self_test", "--self-test", action="store_true", help="score the EXAMPLES of each reward's file instead"
    )
    add_options(parser)
    arguments = parser.parse_args(with_dotted(argv))
    if not arguments.reward:
        raise UserError("give --reward SPEC, or --red-team SPEC")
    if arguments.time_limit_s is not None and not arguments.time_limit_s > 0:
        raise UserError(f"--time_limit_s {arguments.time_limit_s}: must be above 0")
    if arguments.num_workers < 1:
        raise UserError(f"--num_workers {arguments.num_workers}: must be at least 1")
    if arguments.red_team:
        check_options(arguments)
        return arguments
    if not arguments.self_test and (arguments.input is None or arguments.output is None):
        raise UserError("give --input ROWS.jsonl and --output SCORES.jsonl, or --self-test")
    return arguments


async def _red_team(arguments: argparse.Namespace, make_proposer: MakeProposer | None) -> int:
    parts = parts_of(arguments.reward, arguments.time_limit_s)
    rubric = Rubric(parts, num_workers=arguments.num_workers)
    try:
        return await red_team(arguments, rubric, make_proposer)
    finally:
        await rubric.close()


# --- scoring a file ---------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Counts and sums for the summary."""

    scored: int = 0
    abstained: int = 0
    errors: int = 0
    total: float = 0.0
    parts: dict[str, list[float]] = field(default_factory=dict)
    first_error: str | None = None
    problem: str | None = None
    """The first row that no reward could be given."""

    def add(self, score: Score) -> None:
        if score.error is not None:
            self.errors += 1
            self.first_error = self.first_error or score.error
        elif score.reward is None:
            self.abstained += 1
        else:
            self.scored += 1
            self.total += score.reward
        for name, value in score.parts.items():
            if value is not None:
                self.parts.setdefault(name, []).append(value)

    @property
    def rows(self) -> int:
        return self.scored + self.abstained + self.errors

    def summary(self) -> str:
        mean = f"mean reward {self.total / self.scored:.4f}" if self.scored else "no mean reward"
        line = f"{self.rows} rows: {mean}, {self.scored} scored, {self.abstained} abstained, {self.errors} errors"
        if len(self.parts) > 1:
            line += "".join(f"\n  {name}: mean {sum(v) / len(v):.4f} over {len(v)}" for name, v in self.parts.items())
        return line


@dataclass
class _Group:
    """Consecutive rows of one task."""

    lines: list[int]
    rows: list[dict[str, Any]]
    rollouts: list[Rollout]
    problems: dict[int, str]
    """By its place in the group, why a row cannot be scored."""


async def _verify(arguments: argparse.Namespace) -> int:
    parts = parts_of(arguments.reward, arguments.time_limit_s)
    rubric = Rubric(parts, num_workers=arguments.num_workers, strict=True)
    tally = _Tally()
    started = time.perf_counter()
    what = [arguments.reward, arguments.answer_column, arguments.time_limit_s, [str(part) for part in parts]]
    stat = arguments.input.stat() if arguments.input.is_file() else None
    what += [str(arguments.input.absolute()), None if stat is None else [stat.st_size, stat.st_mtime_ns]]
    output = PartialFile(arguments.output, what)
    try:
        with output, _progress(tally) as advance:
            groups = _take_over(_read_groups(arguments.input, rubric, arguments.answer_column), output, tally)
            await _score_all(groups, rubric, arguments, output, tally, advance)
            if not tally.rows:
                raise UserError(f"--input {arguments.input}: it has no rows")
            if tally.problem is not None and not tally.scored:
                raise UserError(tally.problem)
    except UserError:
        if not tally.scored:
            output.drop()
        raise
    finally:
        await rubric.close()
    print(f"{tally.summary()}\n{arguments.output}, {time.perf_counter() - started:.1f} s")
    if not tally.scored:
        failed = f"; the first of {tally.errors} errors:\n{tally.first_error}" if tally.errors else ""
        raise RunFailed(f"no row could be scored{failed or ': the rewards abstained from all of them'}")
    if tally.errors:
        raise RunFailed(f"the rewards failed for {tally.errors} of {tally.rows} rows; the first:\n{tally.first_error}")
    return 0


async def _score_all(
    groups: Iterable[_Group],
    rubric: Rubric,
    arguments: argparse.Namespace,
    output: PartialFile,
    tally: _Tally,
    advance: Any,
) -> None:
    """Score groups, a bounded number at a time, and write them in their order."""
    window = 32 + 8 * arguments.num_workers
    waiting: deque[tuple[_Group, asyncio.Task[None]]] = deque()

    async def score(group: _Group) -> None:
        rollouts = [rollout for k, rollout in enumerate(group.rollouts) if k not in group.problems]
        if rollouts:
            await rubric.score_group(RolloutGroup(task=rollouts[0].task, rollouts=rollouts))

    async def finish_first() -> None:
        group, task = waiting.popleft()
        while True:
            try:
                await task
                break
            except RowError as error:
                where = f"{arguments.input}, line {group.lines[error.index]}, {error}"
                if not tally.scored:
                    raise UserError(where) from None
                group.problems[error.index] = where  # the rewards are right for other rows: this one has an error
                task = asyncio.create_task(score(group))
        lines = ""
        for k, (row, rollout) in enumerate(zip(group.rows, group.rollouts, strict=True)):
            problem = group.problems.get(k)
            found = rollout.score if problem is None else Score(reward=None, error=problem)
            assert found is not None
            tally.add(found)
            tally.problem = tally.problem or problem
            lines += result_line(row, found)
        output.write(lines)
        advance()

    try:
        for group in groups:
            waiting.append((group, asyncio.create_task(score(group))))
            if len(waiting) >= window:
                await finish_first()
        while waiting:
            await finish_first()
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


def _read_groups(file: Path, rubric: Rubric, answer_column: str | None) -> Iterator[_Group]:
    for i, (_, found) in enumerate(itertools.groupby(read_rows(file), key=lambda numbered: row_key(numbered[1]))):
        numbered = list(found)
        lines, rows = [line for line, _ in numbered], [row for _, row in numbered]
        if i == 0:
            rubric.conversational = is_conversational(rows[0])
        problems: dict[int, str] = {}
        rollouts: list[Rollout] = []
        try:
            rollouts = [
                row_to_rollout(row, name=f"{file.stem}-{lines[0]}", index=j, answer_column=answer_column)
                for j, row in enumerate(rows)
            ]
            rubric.require(rollouts[0].task)
        except UserError as error:
            problems = dict.fromkeys(range(len(rows)), f"{_where(file, lines)}: {error}")
            rollouts = rollouts or [row_to_rollout(row, name="", index=j) for j, row in enumerate(rows)]
        yield _Group(lines, rows, rollouts, problems)


def _take_over(groups: Iterator[_Group], output: PartialFile, tally: _Tally) -> Iterator[_Group]:
    """Leave out the groups that an earlier start has finished, and count them."""
    for group in groups:
        if output.left < len(group.rows):
            break
        for row in output.keep(len(group.rows)):
            tally.add(Score(reward=row["reward"], parts=row["parts"], error=row["error"]))
    else:
        output.go_on()
        return
    if tally.rows:
        print(f"going on behind the {tally.rows} rows that {output.file} has", file=sys.stderr)
    output.go_on()
    yield group
    yield from groups


def _where(file: Path, lines: list[int]) -> str:
    return f"{file}, line {lines[0]}" if len(lines) == 1 else f"{file}, lines {lines[0]} to {lines[-1]}"


@contextlib.contextmanager
def _progress(tally: _Tally) -> Iterator[Any]:
    """Give a function to call after each group: it updates a line on a terminal, or prints one every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("scoring") as status:
            yield lambda: status.update(f"scoring: {tally.rows} rows, {tally.errors} errors")
        return
    last = time.monotonic()

    def advance() -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_EVERY_S:
            last = time.monotonic()
            print(f"scoring: {tally.rows} rows, {tally.errors} errors", file=sys.stderr, flush=True)

    yield advance


# --- self-test --------------------------------------------------------------------------------------------------------


async def _self_test(rewards: list[tuple[str, dict[str, Any]]], num_workers: int) -> int:
    failed = 0
    for spec, args in rewards:
        results = await run_examples(spec, args, num_workers=num_workers)
        _print_table(spec, results)
        found = await gold_and_nothing(spec, args, num_workers=num_workers)
        for text in found:
            print(f"{spec}: FAILED {text}")
        failed += sum(not result.passed for result in results) + len(found)
    return 1 if failed else 0


def _print_table(spec: str, results: list[ExampleResult]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "completion", "expected", "got", title=spec)
    for result in results:
        completion = ascii(result.row["completion"])
        completion = completion if len(completion) <= 60 else f"{completion[:57]}..."
        got = "error" if result.score.error is not None else str(result.score.reward)
        mark = Text("ok", style="green") if result.passed else Text("FAILED", style="bold red")
        table.add_row(mark, Text(completion), str(result.expected), got)
    console = Console()
    console.print(table)
    for result in results:
        if result.score.error is not None:
            console.print(Text(result.score.error))
    passed = sum(result.passed for result in results)
    print(f"{spec}: {passed} of {len(results)} examples pass")
