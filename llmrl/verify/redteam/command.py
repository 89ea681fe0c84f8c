"""`llmrl verify --red-team`: rows and a reward in; what pays without a reason out, on the console and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl.data.tasks import PROMPT_COLUMNS
from llmrl.errors import RunFailed, UserError
from llmrl.track.files import replacing
from llmrl.verify.redteam.attack import Attack, Finding, Report
from llmrl.verify.redteam.families import FAMILIES
from llmrl.verify.redteam.loop import Propose, attack_with_model
from llmrl.verify.redteam.target import Target, target_of
from llmrl.verify.reward import isolate
from llmrl.verify.rows import read_tasks, row_to_rollout
from llmrl.verify.rubric import Rubric

MakeProposer = Callable[[str, int], Propose]
"""(path of a model, seed) -> who proposes. Loading a model is the business of layers above this one."""
SHOWN_CHARS = 300


async def red_team(arguments: argparse.Namespace, rubric: Rubric, make_proposer: MakeProposer | None) -> int:
    """Attack a rubric on the rows of `arguments.input`; return 1 if something pays, else 0.

    Raises:
        UserError: the rows cannot be read, or lack what the reward needs.
        RunFailed: the reward fails for every attempt.
    """
    for reward, (spec, _) in zip(rubric.rewards.values(), arguments.reward, strict=True):
        isolate(reward, spec)  # an exploit that ends the process must not end this one
    targets = _targets(arguments, rubric)
    attack = Attack(rubric, targets, _show)
    await attack.run_known()
    if arguments.model is not None:
        if make_proposer is None:
            raise UserError("--model: no model can be loaded here; run it as `llmrl verify`")
        _show(f"loading {arguments.model}")
        propose = make_proposer(arguments.model, arguments.seed)
        before = len(attack.paid)
        await attack_with_model(attack, propose, rounds=arguments.rounds, seed=arguments.seed, paid_before=before)
    report = await attack.finish()
    if report.num_errors and report.num_errors >= report.num_scored:
        raise RunFailed(f"the reward failed for every attempt; the first:\n{report.first_error}")
    print(text_of(report))
    if arguments.output is not None:
        with replacing(arguments.output) as file:
            json.dump(as_dict(report), file, ensure_ascii=True, indent=1, default=str)
            file.write("\n")
        print(arguments.output)
    return 1 if report.findings else 0


def _targets(arguments: argparse.Namespace, rubric: Rubric) -> list[Target]:
    targets: list[Target] = []
    for line, row in read_tasks(arguments.input):
        if len(targets) >= arguments.rows:
            break
        if arguments.answer_column is not None:
            if arguments.answer_column not in row:
                raise UserError(f"{arguments.input}, line {line}: field {arguments.answer_column}: missing")
            row = row | {"answer": row[arguments.answer_column]}
        if not targets:
            rubric.conversational = any(isinstance(row.get(name), list) for name in ("completion", *PROMPT_COLUMNS))
        target = target_of(row, line)
        try:
            rubric.require(row_to_rollout(target.row | {"completion": ""}, name=f"row-{line}").task)
        except UserError as error:
            raise UserError(f"{arguments.input}, line {line}: {error}") from None
        targets.append(target)
    if not targets:
        raise UserError(f"--input {arguments.input}: it has no rows")
    return targets


def _show(line: str) -> None:
    print(f"red team: {line}", file=sys.stderr, flush=True)


def text_of(report: Report) -> str:
    """Return the report for people."""
    lines = [
        f"{report.num_attempts} attempts of {len(FAMILIES)} families on {report.num_rows} rows: "
        f"{_ideas(report.findings)} paid without a reason"
    ]
    for finding in report.findings:
        lines += _lines(finding)
    if report.suspects:
        rows = sorted({line for finding in report.suspects for line in finding.lines})
        lines.append(
            f"{_ideas(report.suspects)} paid on one kind of row alone (lines {', '.join(map(str, rows[:10]))}), "
            "perhaps right by chance: see the report"
        )
    if report.without_good:
        lines.append(
            f"no good completion is known for {len(report.without_good)} rows, so only clear gains count there. Give "
            "rows an `answer`, or a `completion` that should be paid"
        )
    if report.num_errors:
        first = (report.first_error or "").splitlines()[0]
        lines.append(
            f"the reward failed for {report.num_errors} of {report.num_scored} completions; the first: {first}"
        )
    return "\n".join(lines)


def _ideas(findings: list[Finding]) -> str:
    return "1 idea is" if len(findings) == 1 else f"{len(findings) or 'no'} ideas are"


def _lines(finding: Finding) -> list[str]:
    exploit = ascii(finding.exploit)
    exploit = (
        exploit if len(exploit) <= SHOWN_CHARS else f"{exploit[:SHOWN_CHARS]}... ({len(finding.exploit)} characters)"
    )
    good = "unknown" if finding.good is None else f"{finding.good:g}"
    return [
        f"\n{finding.family}: {finding.variant}",
        f"  reward {finding.reward:g} (nothing: {finding.nothing:g}, good: {good}) on {len(finding.lines)} rows, "
        f"first line {finding.lines[0]}",
        f"  {exploit}",
    ]


def as_dict(report: Report) -> dict[str, Any]:
    """Return the report as JSON can hold it."""
    return dataclasses.asdict(report)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the red team."""
    group = parser.add_argument_group("red team")
    group.add_argument("--model", metavar="PATH", help="also let this local model propose exploits")
    group.add_argument("--rounds", type=int, default=4, help="rounds of the model (default 4)")
    group.add_argument("--rows", type=int, default=20, help="attack at most so many rows (default 20)")
    group.add_argument("--seed", type=int, default=0)


def check_options(arguments: argparse.Namespace) -> None:
    """Raise a UserError for options that are wrong."""
    if arguments.input is None:
        raise UserError("--red-team SPEC: give --input ROWS.jsonl, your own rows, with or without completions")
    for name in ("rounds", "rows"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if arguments.model is not None and not Path(arguments.model).expanduser().is_dir():
        raise UserError(f"--model {arguments.model}: no such folder; give the path of a local model")
