"""The loop: prompt -> rollout -> verify -> advantage -> loss -> weight sync. Start reading at `Trainer.fit`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmrl.algo.policy_gradient.dynamic_sampling import collect_informative
from llmrl.config import RunConfig
from llmrl.config.config import pass_at
from llmrl.errors import Interrupted, LlmrlError, RunFailed, UserError
from llmrl.run import saving
from llmrl.run.best import Best
from llmrl.run.build import build
from llmrl.run.callbacks import Callbacks, check_callbacks
from llmrl.run.clock import Clock, run_async
from llmrl.run.given import Given, first_argument, refuse_keywords
from llmrl.run.interruption import Interruption
from llmrl.run.lock import unlock
from llmrl.run.model_folder import save_model
from llmrl.run.pipeline import RolloutQueue, on_device
from llmrl.run.resume import resume
from llmrl.track.files import read_jsonl
from llmrl.track.metrics import pass_rates
from llmrl.train.selfcheck import check_forward
from llmrl.types import Receipt, RolloutGroup, Task, TrainBatch

T = TypeVar("T")


class Trainer:
    """One run, from Python or from a recipe. The other arguments override what `args` says.

    Example:
        >>> Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward=my_reward, train_dataset="openai/gsm8k").train()

    Args:
        first: `args`; or, as in TRL, `model`.
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
        callbacks: objects (or classes) with hooks in transformers' style, such as on_step_end; see `callbacks.py`.

    Raises:
        UserError: the arguments or the data are wrong. It is raised before a model loads.
    """

    def __init__(
        self,
        first: Any = None,
        /,
        *,
        args: Any = None,
        model: Any = None,
        reward: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        algorithm: str | None = None,
        callbacks: Any = None,
        **other: Any,
    ) -> None:
        refuse_keywords(
            other, [name for name in inspect.signature(Trainer).parameters if name not in ("first", "other")]
        )
        args, model = first_argument(first, args, model)
        if reward is not None and reward_funcs is not None:
            raise UserError("reward and reward_funcs are two names for the same: give one of them")
        called = check_callbacks(callbacks)
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
        self.step = 0
        """Steps that are trained."""
        self.policy_version = 0
        self.saved_step = 0
        """The last step that has a checkpoint."""
        self.noted: saving.Noted | None = None
        self.interruption = Interruption(self.config.train.grace_s, self.parallel)
        self.best = Best(self.config.eval, self.output_dir)
        self.unfinished: dict[str, Any] | None = None
        """The row of metrics of a checkpoint that was taken before its evaluation; with the evaluation, if known."""
        self.callbacks = Callbacks(
            called,
            config=self.config,
            args=None if isinstance(args, RunConfig | Mapping) else args,
            parallel=self.parallel,
            context={
                "model": self.policy.causal_lm,
                "processing_class": self.tokenizer,
                "optimizer": self.learner.optimizer,
                "lr_scheduler": None,
                "train_dataloader": None,
                "eval_dataloader": None,
            },
        )

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Run to `train.max_steps` and save the model.

        Args:
            resume_from_checkpoint: what `train.resume_from_checkpoint` says, for scripts that say it here.

        Returns:
            The metrics of the last step.

        Raises:
            RunFailed: to continue would be to train on wrong data or to serve wrong weights.
            Interrupted: SIGTERM or Ctrl-C ended it; what was trained is saved.
        """
        asked = "last" if resume_from_checkpoint is True else resume_from_checkpoint or None
        if asked not in (None, self.config.train.resume_from_checkpoint):
            raise UserError(
                f"train(resume_from_checkpoint={resume_from_checkpoint!r}): the run's folder is opened by Trainer "
                f'already. Give it there: {{"train.resume_from_checkpoint": {asked!r}, ...}}, or to a GRPOConfig'
            )

        async def run() -> dict[str, float]:
            async with self:
                return await self.fit()

        with self.interruption.listening():
            return run_async(run())

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or make one of a class, before the run starts."""
        self.callbacks.add(check_callbacks([callback]))

    async def fit(self) -> dict[str, float]:
        """Do what `train` does, for asynchronous callers: `async with trainer: await trainer.fit()`.

        What differs between kinds of run is behind `source` and `algorithm`; the table in `methods.py` chooses them.
        """
        max_steps = self.config.train.max_steps
        self.console.start("training", total=max_steps, done=self.step)
        self.callbacks.call("on_train_begin")
        metrics = await self._before_first_step()
        saving.note(self)
        while self.step < max_steps and not self.callbacks.stops:
            if self.interruption.agreed():
                raise saving.interrupted(self)
            clock = Clock()
            self.source.begin_step(self.step, max_steps=max_steps, epoch=self.epoch)
            self.callbacks.begin_step()
            try:
                groups, drawn = await self.interruption.giving_up(self._draw(self.step + 1))  # 1 prompt, 2 rollout,
            except Interrupted:  # 3 verify (overlapped)
                raise saving.interrupted(self) from None
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
            self.step += 1
            metrics = await self._finish_step(drawn, metrics)
            saving.note(self)
        self.console.stop()
        self._finish_run()
        return metrics

    async def __aenter__(self) -> Trainer:
        """Check the forward pass, open the source, resume if asked to, and serve the weights."""
        try:
            for note in check_forward(self.policy, packing=self.config.train.packing):
                self.console.say(note)
            for note in await self.source.open(self.learner):
                self.console.say(note)
            resume(self)
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
            self.record.close(failed=exception != (None, None, None))
            self.ledger.file.close()
            unlock(self.output_dir)

    async def evaluate(
        self, tasks: Sequence[Task], *, num_generations: int = 1, temperature: float = 0.0, salt: str = "eval"
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Return the policy's pass rates on held-out tasks, and the rollouts behind them. Every process calls it."""
        groups = await self.collect(tasks, num_generations=num_generations, temperature=temperature, salt=salt)
        self.source.check(groups, what="rollouts of held-out tasks")
        return pass_rates(groups, accuracy=self.source.accuracy, ks=pass_at(num_generations)), groups

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

    async def _finish_step(self, groups: list[RolloutGroup], metrics: dict[str, float]) -> dict[str, float]:
        """Record the step, save a checkpoint and evaluate, where these are due. Returns the metrics with all of it.

        The checkpoint is taken before the evaluation: one that fails or is killed loses no step.
        """
        self.callbacks.at(self.step, self.epoch)
        self.callbacks.call("on_step_end")
        options, last = self.config, self.step == self.config.train.max_steps or self.callbacks.stops
        save, evaluate = options.train.save_steps, options.eval.steps
        saves = last or bool(save and self.step % save == 0) or self.callbacks.asks("should_save")
        evaluates = bool(evaluate and self.eval_tasks) and (last or self.step % evaluate == 0)
        if self.callbacks.asks("should_evaluate"):
            if not self.eval_tasks:
                raise RunFailed(
                    "a callback asked for an evaluation, but there are no held-out tasks: give eval_dataset"
                )
            evaluates = True
        warnings = self.health.observe(metrics, groups)
        changes = self.source.commit(groups)
        if self.record is not None and self.ledger is not None:
            self.ledger.trained(self.step, groups)
            self.ledger.reward_state(self.step, changes)
            self.record.groups(self.step, groups)
        if not evaluates:
            self._record(metrics)
        if saves:
            self._save_checkpoint(unfinished=metrics if evaluates else None)
        if evaluates:
            metrics = await self._evaluate(metrics, saved=saves)
        if self.callbacks.stops and not saves:  # asked for by what came after `on_step_end`
            self._save_checkpoint()
        for text in warnings if self.record is not None else ():
            self.console.warn(f"step {self.step}: {text}")
        return metrics

    async def _evaluate(self, metrics: dict[str, float], *, saved: bool) -> dict[str, float]:
        """Evaluate, and record the step with what was found; `saved` tells whether it has a checkpoint."""
        try:
            found = await self.interruption.giving_up(self.method.evaluate(self))
            if not self.source.max_staleness:  # else rollouts of training report at the same time
                found |= {f"eval/{name}": value for name, value in self.source.take_reported().items()}
        except Interrupted:
            if self.step:
                self._keep_step(metrics, saved=saved)
            raise saving.interrupted(self) from None
        except Exception as error:
            hint = self._keep_step(metrics, saved=saved)
            if isinstance(error, LlmrlError):
                raise RunFailed(f"{error}\n{hint}") from error
            error.add_note(hint)
            raise
        when = f"evaluation after step {self.step}" if self.step else "evaluation before the first step"
        self.console.say(f"{when}: " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
        self._record(metrics | found)
        self._take(found)
        return metrics | found

    def _keep_step(self, metrics: dict[str, float], *, saved: bool) -> str:
        """Record a step whose evaluation failed, in a checkpoint too. Returns how to go on."""
        if not self.step:
            return "This was the evaluation before the first step: eval.at_start false goes on without it"
        if not saved and self.parallel.world == 1:  # other processes may not have failed, and would not be here
            self._save_checkpoint(unfinished=metrics)
            saved = True
        self._record(metrics)
        kept = "and has a checkpoint" if saved else "but has no checkpoint: the steps since the last one are repeated"
        return (
            f"This was the evaluation after step {self.step}, which is trained, {kept}. Continue with "
            "--train.resume_from_checkpoint last, which evaluates again, or with --eval.steps 0 as well, which does not"
        )

    def _take(self, found: dict[str, float]) -> None:
        """Hand an evaluation to the callbacks, and keep the model if it is the best."""
        self.callbacks.evaluated(found)
        if self.best.take(self.step, found):
            if self.parallel.is_main:
                self.best.save(self.policy, self.tokenizer)
            self.parallel.barrier()
        self.callbacks.best(self.best.value, self.best.step)

    def _record(self, metrics: dict[str, float]) -> None:
        """Write the row of a step."""
        if self.record is not None:
            self.record.step(self.step, metrics)
            if self.step:
                self.console.step(self.step, metrics)
        self.callbacks.log(metrics, self.step)

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.sampler.position / max(1, len(self.tasks))

    async def _before_first_step(self) -> dict[str, float]:
        """Evaluate where this is due before the first step of this part. Returns the metrics of the step before it."""
        if self.unfinished is None:
            at_start = self.config.eval.at_start and self.step == 0 and bool(self.eval_tasks)
            return await self._evaluate({}, saved=True) if at_start else self._last_metrics()
        row, self.unfinished = self.unfinished, None
        if found := {key: value for key, value in row.items() if key.startswith("eval/")}:
            self._take(found)  # it was measured and recorded before the interruption
        elif self.config.eval.steps and self.eval_tasks:
            return await self._evaluate(row, saved=True)
        else:
            self._record(row)
        return row

    # --- resuming, saving ---

    def _save_checkpoint(self, unfinished: dict[str, float] | None = None) -> None:
        """Save a checkpoint; `unfinished` are the metrics of a step that will be recorded when it is evaluated."""
        saving.save(self, unfinished)
        self.callbacks.call("on_save")

    def _finish_run(self) -> None:
        """Save the model, say how the run ended, and leave the other processes."""
        if self.callbacks.stops and self.step < self.config.train.max_steps:
            self.console.say(
                f"stopped after step {self.step} of {self.config.train.max_steps} by {self.callbacks.asked_by}; "
                "--train.resume_from_checkpoint last goes on from here"
            )
        self.save_model()
        if self.parallel.is_main and (line := self.best.line()):
            self.console.say(line)
        self.callbacks.call("on_train_end")
        self.parallel.barrier()  # a process that left earlier would end the process group under the others
        self.parallel.finish()

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the model (or adapter) and its tokenizer for `from_pretrained`. Default: model/ in the run's folder.

        `train` does it at its end.
        """
        if self.parallel.is_main:
            folder = self.output_dir / "model" if output_dir is None else Path(output_dir)
            save_model(folder, self.policy, self.tokenizer, run=self.output_dir, step=self.step)
            self.console.say(f"model saved in {folder}")
        if output_dir is None:
            self.parallel.barrier()

    def _last_metrics(self) -> dict[str, float]:
        if not self.step or not self.parallel.is_main:
            return {}
        rows = read_jsonl(self.output_dir / "metrics.jsonl")
        return {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}
