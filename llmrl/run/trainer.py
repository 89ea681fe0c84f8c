"""The loop: prompt -> rollout -> verify -> advantage -> loss -> weight sync, and round again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from llmrl.algo.policy_gradient.dynamic_sampling import collect_informative
from llmrl.algo.preference_presets import is_offline
from llmrl.config import Config
from llmrl.data.preferences import PreferenceCollector
from llmrl.errors import RunFailed
from llmrl.run import checkpoint
from llmrl.run.build import build, precomputes_reference
from llmrl.run.pipeline import RolloutQueue, on_device, staleness_metrics
from llmrl.track.files import read_jsonl
from llmrl.track.metrics import pass_rates, rollout_metrics
from llmrl.train.offline import precompute_reference
from llmrl.train.selfcheck import check_forward
from llmrl.types import RolloutGroup, Task, TrainBatch


class Trainer:
    """One run, from Python or from a recipe. What is given here takes the place of what `args` says.

    Example:
        >>> Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward=my_reward, train_dataset="openai/gsm8k").train()

    Args:
        args: a Config, or a dictionary of dotted fields such as {"train.learning_rate": 2e-6}.
        model: hub id, folder, or a loaded transformers model.
        reward: a function, a spec, or a list of them.
        train_dataset: hub id, file, a datasets.Dataset, rows, or a list of Task.
        eval_dataset: the same, held out.
        processing_class: the tokenizer of a loaded model.
        peft_config: a peft.LoraConfig or `llmrl.config.LoraConfig`.
        algorithm: its name.

    Raises:
        UserError: the arguments or the data are wrong. Raised before a model is loaded.
    """

    def __init__(
        self,
        args: Config | dict[str, Any] | None = None,
        *,
        model: Any = None,
        reward: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        algorithm: str | None = None,
    ) -> None:
        parts = build(
            args,
            model=model,
            reward=reward,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            algorithm=algorithm,
        )
        self.config, self.accelerator, self.console = parts.config, parts.accelerator, parts.console
        self.sampler, self.eval_tasks = parts.sampler, parts.eval_tasks
        self.engine, self.collector, self.rubric = parts.engine, parts.collector, parts.rubric
        self.algorithm, self.policy, self.learner, self.sync = (
            parts.algorithm,
            parts.policy,
            parts.learner,
            parts.sync,
        )
        self.record, self.ledger, self.health = parts.record, parts.ledger, parts.health
        self.tokenizer, self.tasks = parts.tokenizer, parts.tasks
        self.queue = RolloutQueue(
            self.sampler,
            self._collect_group,
            num_prompts=self.config.rollout.num_prompts,
            max_staleness=self.config.rollout.max_staleness,
            max_steps=self.config.train.max_steps,
            accelerator=self.accelerator,
            ledger=self.ledger,
            sampled=not is_offline(self.config) and self.config.bcoder is None,
        )
        self.output_dir = Path(self.config.train.output_dir)
        self.first_step = 0
        self.policy_version = 0

    def train(self) -> dict[str, float]:
        """Run to `train.max_steps` and save the model.

        Returns:
            The metrics of the last step.

        Raises:
            RunFailed: continuing would have trained on wrong data or served wrong weights.
        """

        async def run() -> dict[str, float]:
            async with self:
                return await self.fit()

        return run_async(run())

    async def fit(self) -> dict[str, float]:
        """`train` for callers that are asynchronous themselves: use it inside `async with trainer:`."""
        config = self.config
        metrics = self._last_metrics()
        self.console.start("training", total=config.train.max_steps, done=self.first_step)
        for step in range(self.first_step, config.train.max_steps):
            clock = Clock()
            self.rubric.trainer_state.global_step = step
            groups, drawn = await self._draw(step + 1)  # 1 prompt, 2 rollout, 3 verify (overlapped)
            self._check_scores(drawn)
            clock.lap("rollout")
            await self.engine.sleep()
            batch = self.algorithm.prepare(groups, policy_version=self.policy_version)  # 4 advantage
            stats = await self._update(batch)  # 5 loss (rollouts of later batches go on, where max_staleness allows)
            clock.lap("update")
            self.policy_version += 1
            receipt = await self.sync.push(self.policy_version)  # 6 weight sync
            clock.lap("sync")
            self.sampler.update(drawn)
            metrics = rollout_metrics(drawn, accuracy=self.rubric.accuracy_name or "")
            metrics |= batch.metrics | stats | self.rubric.take_metrics()
            metrics |= staleness_metrics(drawn, batch.policy_version) if batch.sampled else {}
            metrics["rollout/drawn_groups"] = float(len(drawn))
            for line in self.algorithm.observe(metrics):
                self.console.say(line)
            if receipt is not None:
                metrics |= {"sync/max_gap": receipt.max_gap, "sync/change": receipt.change}
                metrics["time/receipt_s"] = receipt.proof_seconds
            metrics |= clock.metrics(tokens=metrics["rollout/num_tokens"])
            metrics |= await self._evaluate(step + 1)
            self._finish_step(step + 1, drawn, metrics)
        self.console.stop()
        self._save_model()
        self.accelerator.wait_for_everyone()  # right before the end, or a process may tear the group down early
        self.accelerator.end_training()
        return metrics

    async def __aenter__(self) -> Trainer:
        """Resume if asked to, serve the weights, warm the verifiers up."""
        try:
            check_forward(self.policy, packing=self.config.train.packing)
            self._precompute()
            self._resume()
            self.accelerator.wait_for_everyone()
            await self.sync.push(self.policy_version)
            await self.rubric.warm()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.console.stop()
        await self.queue.close()
        await self.engine.close()
        await self.rubric.close()
        if self.record is not None and self.ledger is not None:
            self.record.close()
            self.ledger.file.close()

    async def evaluate(
        self, tasks: Sequence[Task], *, num_generations: int = 1, temperature: float = 0.0, salt: str = "eval"
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Pass rates of the policy on held-out tasks (shared by all processes), and the rollouts behind them."""
        groups = await self._collect(list(tasks), num_generations=num_generations, temperature=temperature, salt=salt)
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= num_generations]
        return pass_rates(groups, accuracy=self.rubric.accuracy_name or "", ks=ks), groups

    async def evaluate_preferences(self, tasks: Sequence[Task] | None = None) -> dict[str, float]:
        """Loss, accuracy and margin of the implicit reward on held-out preferences (default: the evaluation rows)."""
        groups = await self._collect(list(self.eval_tasks if tasks is None else tasks))
        batch = self.algorithm.prepare(groups, policy_version=self.policy_version)
        found = self.learner.measure(batch, self.algorithm)
        return {f"eval/{key.removeprefix('preference/').replace('loss/total', 'loss')}": v for key, v in found.items()}

    # --- parts of a step ---

    async def _draw(self, step: int) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """(groups to train on, all groups drawn): the same, unless dynamic sampling draws further ones."""

        async def draw(num_prompts: int) -> list[RolloutGroup]:
            return await self.queue.take(num_prompts, step=step, version=self.policy_version)

        num_prompts, algo = self.config.rollout.num_prompts, self.config.algo
        if not algo.dynamic_sampling:
            groups = await draw(num_prompts)
            return groups, groups
        return await collect_informative(
            draw,
            num_prompts,
            max_batches=algo.dynamic_sampling_max_batches or 1,
            accuracy=self.rubric.accuracy_name or "",
        )

    async def _collect_group(self, task: Task, position: int) -> RolloutGroup:
        """One scored group, with the reward of a greedy completion where the algorithm asks for it."""
        (group,) = await self.collector.collect([task], [position])
        if self.algorithm.needs.greedy_reward:
            options: dict[str, Any] = {"num_generations": 1, "temperature": 0.0, "salt": "greedy"}
            (greedy,) = await self.collector.collect([task], [position], **options)
            score = greedy.rollouts[0].score
            group.greedy_reward = None if score is None else score.reward
        return group

    async def _update(self, batch: TrainBatch) -> dict[str, float]:
        """Stage 5, on a thread of its own where rollouts go on meanwhile."""
        if not self.config.rollout.max_staleness:
            return self.learner.update(batch, self.algorithm)
        return await asyncio.to_thread(on_device, self.accelerator.device, self.learner.update, batch, self.algorithm)

    async def _collect(self, tasks: list[Task], **options: Any) -> list[RolloutGroup]:
        """Groups of held-out tasks, on every process; each process collects its share of them."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(range(rank, len(tasks), world))
        groups = await self.collector.collect([tasks[k] for k in mine], mine, **options)
        if world == 1:
            return groups
        from accelerate.utils import gather_object

        everyone = dict(gather_object(list(zip(mine, groups, strict=True))))
        return [everyone[k] for k in range(len(tasks))]

    def _check_scores(self, groups: list[RolloutGroup]) -> None:
        """Stop when too many rollouts have no score: what is left would be a biased sample."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        unscored = [r for r in rollouts if r.score is None or r.score.reward is None]
        budget = max(1, int(self.config.verify.max_unscored_frac * len(rollouts)))
        if len(unscored) <= budget:
            return
        errors = [r.error or (r.score.error if r.score else None) for r in unscored]
        shown = list(dict.fromkeys(e for e in errors if e))[:3]
        abstained = sum(e is None for e in errors)
        raise RunFailed(
            f"{len(unscored)} of {len(rollouts)} rollouts of this step have no score ({abstained} abstentions, "
            f"{len(unscored) - abstained} errors), more than verify.max_unscored_frac "
            f"{self.config.verify.max_unscored_frac} allows" + "".join(f"\n--- an error:\n{e}" for e in shown)
        )

    async def _evaluate(self, step: int) -> dict[str, float]:
        every = self.config.eval.steps
        if not every or not self.eval_tasks or (step % every and step != self.config.train.max_steps):
            return {}
        if is_offline(self.config):
            return await self.evaluate_preferences()
        rates, _ = await self.evaluate(
            self.eval_tasks,
            num_generations=self.config.eval.num_generations,
            temperature=self.config.eval.temperature,
        )
        return {key.replace("reward/", "eval/"): value for key, value in rates.items()}

    def _finish_step(self, step: int, groups: list[RolloutGroup], metrics: dict[str, float]) -> None:
        """Write the record of a step, warn, and save a checkpoint when one is due."""
        warnings = self.health.observe(metrics)
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

    def _precompute(self) -> None:
        if isinstance(self.collector, PreferenceCollector) and precomputes_reference(self.config):
            preference = self.config.preference
            folder = preference.ref_cache_dir if preference is not None else None
            note = precompute_reference(self.collector, self.learner, Path(folder or self.output_dir))
            self.console.say(note)

    def _resume(self) -> None:
        """Go back to where `train.resume_from_checkpoint` says, the run's files too."""
        wanted = self.config.train.resume_from_checkpoint
        if not wanted:
            return
        folder = checkpoint.find_checkpoint(self.output_dir, wanted)
        files = {"metrics": 0, "rollouts": 0, "ledger": 0}
        if folder is not None:
            state = checkpoint.load_checkpoint(
                folder, policy=self.policy, learner=self.learner, accelerator=self.accelerator
            )
            self.first_step, self.policy_version, files = state["step"], state["policy_version"], state["files"]
            self.sampler.load_state_dict(state["sampler"])
            self.queue.load_state_dict(state["queue"], self.tasks)
            self.health.load_state_dict(state["health"])
            self.algorithm.load_state_dict(state["algorithm"])
        if self.record is not None and self.ledger is not None:
            if folder is not None and folder.parent == self.output_dir / "checkpoints":
                checkpoint.drop_newer(folder)
            self.record.truncate(files)
            self.ledger.file.truncate(files["ledger"])
        self.console.say(
            f"resumed from {folder} (step {self.first_step} of {self.config.train.max_steps})"
            if folder is not None
            else "the run was stopped before its first checkpoint: it starts again from the beginning"
        )

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
            accelerator=self.accelerator,
            keep=self.config.train.save_total_limit,
        )

    def _save_model(self) -> None:
        """model/ in the run directory: the trained model (or adapter) and its tokenizer, ready for from_pretrained."""
        if self.accelerator.is_main_process:
            folder = self.output_dir / "model"
            self.policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.console.say(f"model saved in {folder}")
        self.accelerator.wait_for_everyone()

    def _last_metrics(self) -> dict[str, float]:
        if not self.first_step or not self.accelerator.is_main_process:
            return {}
        return {k: v for k, v in read_jsonl(self.output_dir / "metrics.jsonl")[-1].items() if k != "step"}


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


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, also where an event loop is already running (a notebook): then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = asyncio.run(coroutine)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, name="llmrl")
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
