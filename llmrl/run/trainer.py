"""The loop: prompt -> rollout -> verify -> advantage -> loss -> weight sync. Start reading at `Trainer.fit`."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from llmrl.algo.policy_gradient.dynamic_sampling import collect_informative
from llmrl.config import RunConfig, to_dict
from llmrl.errors import UserError
from llmrl.run import checkpoint
from llmrl.run.build import build
from llmrl.run.given import Given, refuse_keywords
from llmrl.run.model_folder import TOKENIZER, save_model
from llmrl.run.pipeline import RolloutQueue, on_device
from llmrl.track import history
from llmrl.track.files import read_jsonl
from llmrl.track.metrics import pass_rates
from llmrl.track.record import environment
from llmrl.train.selfcheck import check_forward
from llmrl.types import Receipt, RolloutGroup, Task, TrainBatch

T = TypeVar("T")


class Trainer:
    """One run, from Python or from a recipe. The other arguments override what `args` says.

    Example:
        >>> Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward=my_reward, train_dataset="openai/gsm8k").train()

    Args:
        args: a configuration; a dictionary of dotted options such as {"train.learning_rate": 2e-6}, or of TRL's names;
            or TRL's GRPOConfig, DPOConfig or KTOConfig.
        model: hub id, folder, or a loaded transformers model.
        reward: a function, a spec, a RewardConfig (with weight, gate, scale), a list of these, or a Rubric.
        reward_funcs: TRL's name for it.
        train_dataset: hub id, file, a datasets.Dataset, rows, or a list of Task.
        eval_dataset: held-out tasks, in any of these forms.
        processing_class: the tokenizer of a loaded model.
        peft_config: a peft.LoraConfig or `llmrl.config.LoraConfig`.
        algorithm: the name of a preset.

    Raises:
        UserError: the arguments or the data are wrong. It is raised before a model loads.
    """

    def __init__(
        self,
        args: RunConfig | Mapping[str, Any] | Any = None,
        *,
        model: Any = None,
        reward: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        algorithm: str | None = None,
        **other: Any,
    ) -> None:
        refuse_keywords(other, [name for name in inspect.signature(Trainer).parameters if name != "other"])
        if reward is not None and reward_funcs is not None:
            raise UserError("reward and reward_funcs are two names for the same: give one of them")
        parts = build(
            args,
            Given(
                model=model,
                reward=reward_funcs if reward is None else reward,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                algorithm=algorithm,
            ),
        )
        self.config, self.method, self.parallel = parts.config, parts.method, parts.parallel
        self.sampler, self.source, self.algorithm = parts.sampler, parts.source, parts.algorithm
        self.policy, self.learner, self.tokenizer = parts.policy, parts.learner, parts.tokenizer
        self.record, self.ledger, self.health, self.console = parts.record, parts.ledger, parts.health, parts.console
        self.tasks, self.eval_tasks = parts.tasks, parts.eval_tasks
        self.queue = RolloutQueue(
            self.sampler,
            self._collect_group,
            num_prompts=self.config.rollout.num_prompts,
            max_staleness=self.source.max_staleness,
            max_steps=self.config.train.max_steps,
            parallel=self.parallel,
            ledger=self.ledger,
        )
        self.output_dir = Path(self.config.train.output_dir)
        self.first_step = 0
        self.policy_version = 0

    def train(self) -> dict[str, float]:
        """Run to `train.max_steps` and save the model.

        Returns:
            The metrics of the last step.

        Raises:
            RunFailed: to continue would be to train on wrong data or to serve wrong weights.
        """

        async def run() -> dict[str, float]:
            async with self:
                return await self.fit()

        return run_async(run())

    async def fit(self) -> dict[str, float]:
        """Do what `train` does, for asynchronous callers: `async with trainer: await trainer.fit()`.

        What differs between kinds of run is behind `source` and `algorithm`; the table in `methods.py` chooses them.
        """
        max_steps = self.config.train.max_steps
        metrics = self._last_metrics()
        self.console.start("training", total=max_steps, done=self.first_step)
        for step in range(self.first_step, max_steps):
            clock = Clock()
            self.source.begin_step(step, max_steps=max_steps, epoch=self.sampler.position / max(1, len(self.tasks)))
            groups, drawn = await self._draw(step + 1)  # 1 prompt, 2 rollout, 3 verify (overlapped)
            clock.lap("rollout")
            batch = self.algorithm.prepare(groups, policy_version=self.policy_version)  # 4 advantage
            stats = await self._update(batch)  # 5 loss
            clock.lap("update")
            self.policy_version += 1
            receipt = await self.source.serve(self.policy_version)  # 6 weight sync
            clock.lap("sync")
            self.sampler.update(drawn)
            metrics = self._measure(batch, drawn, stats, receipt)
            metrics |= clock.metrics(tokens=metrics["rollout/num_tokens"])
            metrics |= await self._evaluate(step + 1)
            self._finish_step(step + 1, drawn, metrics)
        self.console.stop()
        self._save_model()
        self.parallel.barrier()  # a process that left earlier would end the process group under the others
        self.parallel.finish()
        return metrics

    async def __aenter__(self) -> Trainer:
        """Check the forward pass, open the source, resume if asked to, and serve the weights."""
        try:
            for note in check_forward(self.policy, packing=self.config.train.packing):
                self.console.say(note)
            for note in await self.source.open(self.learner):
                self.console.say(note)
            self._resume()
            self.parallel.barrier()
            await self.source.serve(self.policy_version)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.console.stop()
        await self.queue.close()
        await self.source.close()
        if self.record is not None and self.ledger is not None:
            self.record.close()
            self.ledger.file.close()

    async def evaluate(
        self, tasks: Sequence[Task], *, num_generations: int = 1, temperature: float = 0.0, salt: str = "eval"
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Return the policy's pass rates on held-out tasks, and the rollouts behind them. Every process calls it."""
        groups = await self.collect(tasks, num_generations=num_generations, temperature=temperature, salt=salt)
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= num_generations]
        return pass_rates(groups, accuracy=self.source.accuracy, ks=ks), groups

    async def collect(self, tasks: Sequence[Task], **options: Any) -> list[RolloutGroup]:
        """Return the groups of held-out tasks. Each process collects its share, and all get everything."""
        mine = list(range(self.parallel.rank, len(tasks), self.parallel.world))
        groups = await self.source.collect([tasks[k] for k in mine], mine, **options)
        everyone = dict(self.parallel.gather_objects(list(zip(mine, groups, strict=True))))
        return [everyone[k] for k in range(len(tasks))]

    # --- parts of a step ---

    async def _draw(self, step: int) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Return the groups to train on, and all groups drawn. They differ only with dynamic sampling."""

        async def draw(num_prompts: int) -> list[RolloutGroup]:
            return await self.queue.take(num_prompts, step=step, version=self.policy_version)

        groups, drawn = await collect_informative(
            draw,
            self.config.rollout.num_prompts,
            max_batches=self.algorithm.needs.sampling_batches,
            accuracy=self.source.accuracy,
        )
        self.source.check(drawn)
        return groups, drawn

    async def _collect_group(self, task: Task, position: int) -> RolloutGroup:
        """Return one scored group, with the reward of a greedy completion if the algorithm needs it."""
        (group,) = await self.source.collect([task], [position])
        if self.algorithm.needs.greedy_reward:
            (greedy,) = await self.source.collect([task], [position], num_generations=1, temperature=0.0, salt="greedy")
            score = greedy.rollouts[0].score
            group.greedy_reward = None if score is None else score.reward
        return group

    async def _update(self, batch: TrainBatch) -> dict[str, float]:
        """Run stage 5, on a thread of its own if rollouts of later batches may go on meanwhile."""
        await self.source.rest()
        if not self.source.max_staleness:
            return self.learner.update(batch, self.algorithm)
        return await asyncio.to_thread(on_device, self.parallel.device, self.learner.update, batch, self.algorithm)

    def _measure(
        self, batch: TrainBatch, drawn: list[RolloutGroup], stats: dict[str, float], receipt: Receipt | None
    ) -> dict[str, float]:
        """Gather the metrics of a step, and let the algorithm adapt to them."""
        metrics = self.source.metrics(drawn, batch.policy_version) | batch.metrics | stats
        metrics["rollout/drawn_groups"] = float(len(drawn))
        for line in self.algorithm.observe(metrics):
            self.console.say(line)
        if receipt is not None:
            metrics |= {"sync/max_gap": receipt.max_gap, "sync/gap": receipt.mean_gap, "sync/limit": receipt.limit}
            metrics["sync/change"] = receipt.change
            metrics["time/receipt_s"] = receipt.proof_seconds
        return metrics

    async def _evaluate(self, step: int) -> dict[str, float]:
        every = self.config.eval.steps
        if not every or not self.eval_tasks or (step % every and step != self.config.train.max_steps):
            return {}
        return await self.method.evaluate(self)

    def _finish_step(self, step: int, groups: list[RolloutGroup], metrics: dict[str, float]) -> None:
        """Record the step, show warnings, and save a checkpoint when one is due."""
        warnings = self.health.observe(metrics, groups)
        if self.record is not None and self.ledger is not None:
            self.ledger.trained(step, groups)
            self.record.step(step, metrics, groups)
            self.console.step(step, metrics)
            for text in warnings:
                self.console.warn(f"step {step}: {text}")
        every = self.config.train.save_steps
        if (every and step % every == 0) or step == self.config.train.max_steps:
            self._save_checkpoint(step)

    # --- resuming, saving ---

    def _resume(self) -> None:
        """Restore what `train.resume_from_checkpoint` names, and cut the run's files back to that step."""
        wanted = self.config.train.resume_from_checkpoint
        if not wanted:
            return self._begin_part(None)
        folder = checkpoint.find_checkpoint(self.output_dir, wanted)
        files = {"metrics": 0, "rollouts": 0, "ledger": 0}
        if folder is not None:
            state = checkpoint.load_checkpoint(folder, policy=self.policy, learner=self.learner, parallel=self.parallel)
            self.first_step, self.policy_version, files = state["step"], state["policy_version"], state["files"]
            self.sampler.load_state_dict(state["sampler"])
            self.queue.load_state_dict(state["queue"], self.tasks)
            self.health.load_state_dict(state["health"])
            self.algorithm.load_state_dict(state["algorithm"])
        if self.record is not None and self.ledger is not None:
            if folder is not None and not checkpoint.belongs_to(folder, self.output_dir):
                files = checkpoint.branch(folder, self.output_dir)
                self.console.say(f"a branch of {folder.parent.parent}: its steps up to here are copied")
            self.record.truncate(files)
            self.ledger.file.truncate(files["ledger"])
        self.console.say(
            f"resumed from {folder} (step {self.first_step} of {self.config.train.max_steps})"
            if folder is not None
            else "the run was stopped before its first checkpoint: it starts again from the beginning"
        )
        self._begin_part(folder)

    def _begin_part(self, resumed_from: Path | None) -> None:
        """Write down what this part of the run uses, and say what differs from the part before."""
        if not self.parallel.is_main:
            return
        self.tokenizer.save_pretrained(self.output_dir / TOKENIZER)  # pyright: ignore[reportUnknownMemberType]
        found = environment(
            device=str(self.parallel.device), num_processes=self.parallel.world, distributed_type=self.parallel.kind
        )
        for change in history.begin(
            self.output_dir,
            to_dict(self.config),
            step=self.first_step,
            environment=found,
            resumed_from=resumed_from,
        ):
            self.console.say(f"changed: {change}")

    def _save_checkpoint(self, step: int) -> None:
        files = {}
        if self.record is not None and self.ledger is not None:
            files = self.record.lengths() | {"ledger": self.ledger.file.sync()}
        state = {
            "policy_version": self.policy_version,
            "sampler": self.sampler.state_dict(),
            "queue": self.queue.state_dict(),
            "health": self.health.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "files": files,
        }
        checkpoint.save_checkpoint(
            self.output_dir,
            step,
            policy=self.policy,
            learner=self.learner,
            state=state,
            parallel=self.parallel,
            keep=self.config.train.save_total_limit,
        )

    def _save_model(self) -> None:
        """Save the trained model (or adapter) and its tokenizer in model/, ready for `from_pretrained`."""
        if self.parallel.is_main:
            folder, last = self.output_dir / "model", max(self.first_step, self.config.train.max_steps)
            save_model(folder, self.policy, self.tokenizer, run=self.output_dir, step=last)
            self.console.say(f"model saved in {folder}")
        self.parallel.barrier()

    def _last_metrics(self) -> dict[str, float]:
        if not self.first_step or not self.parallel.is_main:
            return {}
        rows = read_jsonl(self.output_dir / "metrics.jsonl")
        return {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}


class Clock:
    """Seconds spent in each stage of a step."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def metrics(self, *, tokens: float) -> dict[str, float]:
        total = time.perf_counter() - self.begin
        times = {f"time/{name}_s": seconds for name, seconds in self.laps.items()}
        return times | {"time/step_s": total, "perf/tokens_per_s": tokens / total}


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. In a notebook, whose event loop is already running, use a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    pool = ThreadPoolExecutor(1, "llmrl")
    try:
        return pool.submit(asyncio.run, coroutine).result()
    finally:
        pool.shutdown(wait=False)  # an interrupt of the notebook must not wait for the run
