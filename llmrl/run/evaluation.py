"""`llmrl eval`: sample from a model, score the samples, and report mean@k, pass@k and maj@k.

It uses the same engine, collector and rubric as training, and the same proof that the engine serves the model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llmrl.config import EvalRun, parse
from llmrl.config.evaluation import check_evaluation
from llmrl.errors import LlmrlError, RunFailed, UserError
from llmrl.track.metrics import majority_rates, pass_rates, rollout_metrics
from llmrl.track.progress import progress
from llmrl.track.ranking import mean_logprob_scores, ranking_rates
from llmrl.types import Message, Rollout, RolloutGroup, Score, Status, Task, Turn
from llmrl.verify.budget import check_scores

SHORT = {"--model": "--model.path", "--data": "--data.path", "--samples": "--rollout.num_generations"}
"""Short names on the command line for fields that every evaluation gives."""


def run(argv: list[str]) -> int:
    """Run the command. Returns its exit code: 0 done, 1 the run failed, 2 arguments or input are wrong."""
    try:
        options = read_arguments(argv)
        report = asyncio.run(evaluate(options))
    except LlmrlError as error:
        print(f"llmrl eval: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmrl eval: interrupted, nothing was written", file=sys.stderr)
        return 1
    show(report, to_error=options.output == "-")
    if options.output is not None:
        _write(options.output, json.dumps(report, indent=2) + "\n")
    return 0


def read_arguments(argv: list[str]) -> EvalRun:
    """Read `--model`, `--data`, `--reward` (repeatable), `--samples`, and any field of `EvalRun`, dotted.

    Raises:
        UserError: unknown, wrong or contradicting arguments.
    """
    plain, specs, waiting = list[str](), list[str](), list(argv)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name == "--reward":
            if not equals and not waiting:
                raise UserError("--reward needs a spec, such as rewards/math_answer.py:math_answer")
            specs.append(value if equals else waiting.pop(0))
        else:
            plain.append(SHORT.get(name, name) + equals + value)
    if specs:
        plain.append("--rewards=" + json.dumps([{"fn": spec} for spec in specs]))
    try:
        options = parse(plain, config_class=EvalRun, prog="llmrl eval")
    except UserError as error:
        text = str(error)
        for short, long in SHORT.items():  # report a name as it was typed
            text = text.replace(long.removeprefix("--"), short) if short in argv else text
        raise UserError(text) from None
    check_evaluation(options)
    return options


# --- the work ---------------------------------------------------------------------------------------------------------


class Evaluator:
    """A model behind an engine, and the rubric. Use it as `async with Evaluator(options) as evaluator`."""

    def __init__(self, options: EvalRun) -> None:
        from llmrl.data.report import RowReport
        from llmrl.data.tasks import load_tasks
        from llmrl.model.attention import check_attention
        from llmrl.model.load import load_generation_config, load_model, load_tokenizer, model_limits
        from llmrl.model.logprob_head import keep_logits_in_float32
        from llmrl.model.parallel import make_parallel
        from llmrl.model.policy import Policy
        from llmrl.rollout.tasks import TaskFeed, TaskSet
        from llmrl.run.data import quieten_libraries
        from llmrl.run.engines import start_engine
        from llmrl.verify.rubric import Rubric

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("llmrl eval runs in one process: start it without a launcher")
        self.options = options
        report = RowReport(on_bad_row=options.data.on_bad_row)
        tasks, conversational = load_tasks(options.data, report), options.data.prompt_format == "chat"
        self.rubric = Rubric.from_config(options.rewards, options.verify, conversational=conversational)
        feed = TaskFeed(
            TaskSet(tasks, options.data, report),
            TaskSet([]),
            self.rubric,
            data=options.data,
            rollout=options.rollout,
            verify=options.verify,
            seed=options.seed,
        )
        quieten_libraries()
        tokenizer = load_tokenizer(options.model)
        longest = options.rollout.vllm.max_model_len if options.rollout.vllm is not None else None
        limits = model_limits(options.model, longest=longest)
        for note in feed.encode(tokenizer, load_generation_config(options.model), limits):
            print(f"llmrl eval: {note}", file=sys.stderr)
        self.tasks, self.num_dropped = feed.tasks, report.num_rows - len(feed.tasks)
        parallel = make_parallel(seed=options.seed, dtype=options.model.dtype)
        kernel = options.model.attn_implementation
        check_attention(kernel, options.model.dtype, parallel.device.type, training=False)
        model: Any = load_model(options.model, tokenizer, seed=options.seed)
        if options.model.float32_head:
            keep_logits_in_float32(model)
        self.policy = Policy(model.to(parallel.device), temperature=1.0, keep_reference=False)
        self.collector = feed.collector(
            lambda: start_engine(options.model, options.rollout, self.policy, parallel, log_dir=Path("servers"))
        )

    async def __aenter__(self) -> Evaluator:
        """Serve the weights, with the same proof as in training, and start the verifiers."""
        from llmrl.train.selfcheck import check_forward

        try:
            check_forward(self.policy, packing=False)
            await self.collector.serve(0)
            await self.rubric.warm()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.collector.close()

    async def sample(self, advance: Callable[[int], None] = lambda _: None) -> list[RolloutGroup]:
        """Return the scored samples of all tasks, in order; call `advance` after each task.

        Raises:
            RunFailed: more than `verify.max_unscored_frac` of the samples have no score because something failed.
        """
        from llmrl.rollout.collector import gather_or_cancel

        async def one(position: int, task: Task) -> RolloutGroup:
            [group] = await self.collector.collect([task], [position], salt="eval")
            advance(1)
            return group

        groups = await gather_or_cancel([one(i, task) for i, task in enumerate(self.tasks)])
        self._check(groups)
        return groups

    def _check(self, groups: list[RolloutGroup]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_scores(rollouts, self.options.verify, what="samples")
        if all(r.score is None or r.score.reward is None for r in rollouts):
            raise RunFailed(f"none of the {len(rollouts)} samples could be judged: the rewards abstained")


def best_device() -> str:
    """Return the accelerator of this machine, or its CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None or device.type == "mps" else device.type


async def evaluate(options: EvalRun) -> dict[str, Any]:
    """Sample, score, rank and report, and write the samples to `options.save_samples`.

    Raises:
        UserError: the arguments or the data are wrong.
        RunFailed: the engine or the rewards failed.
    """
    start = time.perf_counter()
    if options.rerank_model is not None:
        from llmrl.run.methods import RANKERS

        RANKERS[options.rerank or ""].check(options.rerank_model)
    async with Evaluator(options) as evaluator:
        ready = time.perf_counter()
        with progress("sampling", len(evaluator.tasks), unit="tasks") as advance:
            groups = await evaluator.sample(advance)
        sampled = time.perf_counter()
        name = evaluator.rubric.accuracy_name or ""
        report = summarise(groups, options, name) | {"num_dropped": evaluator.num_dropped}
        if options.rerank is not None:
            report["rerank"] = _ranked(groups, options, name)
    if options.save_samples is not None:
        write_samples(groups, options.save_samples)
    seconds = {"load": ready - start, "sample": sampled - ready, "total": time.perf_counter() - start}
    return report | {"seconds": {key: round(value, 2) for key, value in seconds.items()}}


def summarise(groups: list[RolloutGroup], options: EvalRun, accuracy: str) -> dict[str, Any]:
    """Return the numbers of an evaluation. `accuracy` names the reward that is at least 1 for right samples.

    `mean@n_stderr` is the standard error over tasks, from the spread of their means.
    """
    n = options.rollout.num_generations
    ks = sorted({*options.ks} or {n, *(k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k < n)})
    rates = pass_rates(groups, accuracy=accuracy, ks=ks) | majority_rates(groups, accuracy=accuracy, ks=ks)
    means = [m for group in groups if not math.isnan(m := pass_rates([group], accuracy=accuracy)["reward/pass@1"])]
    others = rollout_metrics(groups, accuracy=accuracy)
    names = [key for key in others if not key.startswith("reward/pass@")]
    return {
        "model": options.model.path,
        "data": options.data.path,
        "rewards": [dataclasses.asdict(reward) for reward in options.rewards],
        "num_tasks": len(groups),
        "samples": n,
        "temperature": options.rollout.temperature,
        "seed": options.seed,
        f"mean@{n}": fmean(means),
        f"mean@{n}_stderr": stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        **{key.removeprefix("reward/"): value for key, value in rates.items()},
        "metrics": {key: None if math.isnan(others[key]) else others[key] for key in names},
    }


def _ranked(groups: list[RolloutGroup], options: EvalRun, accuracy: str) -> dict[str, Any]:
    """Return pass@1 of each task's first-ranked sample, and of a random and a perfect choice among the samples."""
    if options.rerank_model is None:
        scores = mean_logprob_scores(groups)
    else:
        from llmrl.run.methods import RANKERS

        ranker = RANKERS[options.rerank or ""].load(
            options.rerank_model, device=best_device(), exact=options.rerank_exact
        )
        scores = ranker.score_groups(groups)
    return {"by": options.rerank, "model": options.rerank_model} | ranking_rates(groups, scores, accuracy=accuracy)


def write_samples(groups: list[RolloutGroup], place: str | Path) -> None:
    """Write one row per task with its samples as JSON lines."""
    _write(str(place), "".join(json.dumps(sample_row(group), default=str) + "\n" for group in groups))


def read_samples(file: str | Path) -> list[RolloutGroup]:
    """Return what `write_samples` wrote as scored groups, with the log-probabilities of the model that sampled."""
    from llmrl.config import DataConfig
    from llmrl.data.tasks import load_tasks

    tasks = load_tasks(DataConfig(path=str(file)))
    return [RolloutGroup(task=t, rollouts=[_rollout(t, i, s) for i, s in enumerate(t.meta["samples"])]) for t in tasks]


def _rollout(task: Task, index: int, row: dict[str, Any]) -> Rollout:
    turn = Turn(
        prompt_ids=[],
        completion_ids=row["completion_ids"],
        rollout_logprobs=row["logprobs"],
        finish=row["finish"],
        policy_version=(0, 0),
        message=Message(role="assistant", content=row["completion"]),
    )
    status = Status.TRUNCATED_LENGTH if row["finish"] == "length" else Status.COMPLETED
    score = Score(reward=row["reward"], parts=row["parts"])
    return Rollout(task=task, index=index, turns=[turn], status=status, score=score)


def sample_row(group: RolloutGroup) -> dict[str, Any]:
    """Return a task and its samples as a row of a dataset: messages, answer, the row's own columns, samples."""
    columns = {k: v for k, v in group.task.meta.items() if k not in ("messages", "answer", "samples")}
    return {
        **columns,
        "messages": group.task.messages,
        **({} if group.task.answer is None else {"answer": group.task.answer}),
        "samples": [_sample(rollout) for rollout in group.rollouts if not rollout.status.is_error],
    }


def _sample(rollout: Rollout) -> dict[str, Any]:
    turn, score = rollout.turns[-1], rollout.score
    return {
        "completion": rollout.completion,
        "completion_ids": turn.completion_ids,
        "logprobs": [round(value, 6) for value in turn.rollout_logprobs],
        "finish": turn.finish,
        "reward": score.reward if score else None,
        "parts": score.parts if score else {},
    }


# --- what people see --------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], *, to_error: bool) -> None:
    """Print a table of the rates."""
    from rich.console import Console
    from rich.table import Table

    n = report["samples"]
    table = Table(title=f"{report['model']} on {report['num_tasks']} tasks of {report['data']}")
    table.add_column("")
    table.add_column("", justify="right")
    error = report[f"mean@{n}_stderr"]
    table.add_row(f"mean@{n}", f"{report[f'mean@{n}']:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    for key, value in report.items():
        if key.startswith(("pass@", "maj@")):
            table.add_row(key, f"{value:.4f}")
    ranked = report.get("rerank")
    if ranked is not None:
        table.add_row(f"first by {ranked['by']}", f"{ranked['ranked']:.4f}")
        table.add_row("random choice", f"{ranked['random']:.4f}")
        table.add_row("best possible", f"{ranked['oracle']:.4f}")
    for key in ("reward/mean", "rollout/length/mean", "rollout/truncated_frac", "reward/unscored_frac"):
        value = report["metrics"][key]
        table.add_row(key, "-" if value is None else f"{value:.4f}")
    Console(stderr=to_error, highlight=False).print(table)


def _write(place: str, text: str) -> None:
    from llmrl.track.files import replacing

    if place == "-":
        print(text, end="")
        return
    with replacing(Path(place)) as file:
        file.write(text)
