"""Callbacks in transformers' style: objects whose hooks are called while a run goes on, and what they ask for.

A hook is called as `hook(args, state, control, **more)`; `state` and `control` are transformers' own classes. Each
process calls its own callbacks, and what any of them asks for holds on all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from llmrl.config.hints import near
from llmrl.errors import RunFailed, UserError

if TYPE_CHECKING:
    from llmrl.config import RunConfig
    from llmrl.model.parallel import Parallel

HOOKS = (
    "on_init_end",
    "on_train_begin",
    "on_step_begin",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_train_end",
)
"""What is called: after `Trainer` is built; before the first step; around each step (a batch of rollouts); with `logs`
when its metrics are recorded; with `metrics` after an evaluation; after a checkpoint; and when the model is saved."""
NEVER = {
    "on_substep_end": "a step's passes are not seen from outside: use on_step_end",
    "on_pre_optimizer_step": "optimizer steps happen inside of a step: use on_step_end",
    "on_optimizer_step": "optimizer steps happen inside of a step: use on_step_end",
    "on_epoch_begin": "use on_step_begin, with state.epoch",
    "on_epoch_end": "use on_step_end, with state.epoch",
}
"""Hooks of transformers' that are not called, although what they wait for happens."""
NOTHING_HAPPENS = ("on_predict", "on_prediction_step", "on_push_begin")
"""Hooks of transformers' for what a run here does not do. A callback may have them."""
CONTEXT = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
"""Keyword arguments of every hook."""
FLAGS = ("should_training_stop", "should_save", "should_evaluate")
"""What a callback can ask for with `control`."""


def check_callbacks(given: Any) -> list[Any]:
    """Return the callbacks; of classes, an instance.

    Raises:
        UserError: something has no hook, or one that is never called.
    """
    listed: list[Any] = [] if given is None else [*given] if isinstance(given, Sequence) else [given]
    found: list[Any] = []
    for callback in listed:
        if inspect.isclass(callback):
            try:
                callback = callback()
            except TypeError as error:
                raise UserError(
                    f"callback {callback.__name__} cannot be made without arguments ({error}): give an object"
                ) from None
        _check_hooks(callback)
        found.append(callback)
    return found


def _check_hooks(callback: Any) -> None:
    name = type(callback).__name__
    if inspect.isroutine(callback):
        raise UserError(f"callback {callback!r} is a function: give an object with a method such as on_step_end")
    own = _own_methods(callback)
    for hook in own:
        if hook in NEVER:
            raise UserError(f"callback {name} has {hook}, which is not called: {NEVER[hook]}")
        if hook.startswith("on_") and hook not in (*HOOKS, *NOTHING_HAPPENS):
            raise UserError(
                f"callback {name} has {hook}, which is no event{near(hook, HOOKS)}; there are {', '.join(HOOKS)}"
            )
        if inspect.iscoroutinefunction(getattr(callback, hook)):
            raise UserError(f"callback {name}.{hook} is a coroutine function: hooks are called, not awaited")
        if hook in HOOKS:
            _check_signature(name, hook, getattr(callback, hook))
    if not set(own) & set(HOOKS):
        plain = {hook.replace("_", ""): hook for hook in HOOKS}
        meant = next((plain[word] for word in (m.lower().replace("_", "") for m in own) if word in plain), None)
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(f"callback {name} has no hook{hint}; give it one of {', '.join(HOOKS)}")


def _check_signature(name: str, hook: str, method: Any) -> None:
    """Refuse a hook that cannot be called, before the first step."""
    named = {"on_log": ["logs"], "on_evaluate": ["metrics"]}.get(hook, [])
    try:
        inspect.signature(method).bind(None, None, None, **dict.fromkeys([*CONTEXT, *named]))
    except TypeError as error:
        raise UserError(
            f"callback {name}.{hook} cannot be called as {hook}(args, state, control, **kwargs): {error}"
        ) from None
    except ValueError:  # written in C, without a signature
        return


def _own_methods(callback: Any) -> list[str]:
    """Return the public methods of a callback, without those that transformers' base class has already."""
    cls = cast("type[Any]", type(callback))
    base: Any = next(
        (each for each in cls.__mro__ if each.__name__ == "TrainerCallback" and "transformers" in each.__module__), None
    )
    names = [name for name in {*dir(cls), *getattr(callback, "__dict__", {})} if not name.startswith("_")]
    return sorted(
        name
        for name in names
        if callable(getattr(callback, name, None)) and getattr(cls, name, None) is not getattr(base, name, name)
    )


class Callbacks:
    """The callbacks of a run, and what they are shown.

    Args:
        callbacks: what `check_callbacks` returned.
        config: of the run.
        args: the user's configuration of TRL; default: an object with transformers' names for what `config` says.
        parallel: the processes.
        context: further keyword arguments of every hook.
    """

    def __init__(
        self, callbacks: list[Any], *, config: RunConfig, args: Any, parallel: Parallel, context: dict[str, Any]
    ) -> None:
        self.config, self.parallel, self.context = config, parallel, context
        self.args = args if args is not None else _training_arguments(config)
        self.callbacks: list[Any] = []
        self.stops = False
        """Whether a callback has asked for the end of the run."""
        self.asked_by = ""
        self.add(callbacks)

    def add(self, callbacks: list[Any]) -> None:
        """Add callbacks, and call their `on_init_end`."""
        before, self.callbacks = self.callbacks, callbacks
        if callbacks:
            if not before:
                self._begin()
            self.call("on_init_end")
        self.callbacks = [*before, *callbacks]

    def _begin(self) -> None:
        from transformers import TrainerControl, TrainerState

        config, parallel = self.config, self.parallel

        self.control = TrainerControl()
        self.state = TrainerState()
        self.state.max_steps = config.train.max_steps
        self.state.eval_steps, self.state.save_steps = config.eval.steps, config.train.save_steps
        self.state.logging_steps, self.state.epoch = 1, 0.0
        self.state.is_world_process_zero = parallel.is_main
        self.state.is_local_process_zero = parallel.accelerator.is_local_main_process

    def at(self, step: int, epoch: float) -> None:
        """Set where the run is."""
        if self.callbacks:
            self.state.global_step, self.state.epoch = step, epoch

    def begin_step(self) -> None:
        """Forget what was asked for in the step before, and call `on_step_begin`."""
        if self.callbacks:
            for flag in ("should_save", "should_evaluate", "should_log"):
                setattr(self.control, flag, False)
            self.call("on_step_begin")

    def log(self, logs: dict[str, float], step: int) -> None:
        """Add a row of metrics to the state's history, and call `on_log`."""
        if self.callbacks:
            self.state.log_history.append({**logs, "step": step})
            self.call("on_log", logs=dict(logs))

    def evaluated(self, found: dict[str, float]) -> None:
        """Call `on_evaluate`, with every metric by its name here and by transformers' (eval/loss, eval_loss)."""
        self.call("on_evaluate", metrics={**found, **{key.replace("eval/", "eval_", 1): v for key, v in found.items()}})

    def best(self, value: float | None, step: int | None) -> None:
        """Set the best evaluation so far (transformers sets it after `on_evaluate` too)."""
        if self.callbacks:
            self.state.best_metric, self.state.best_global_step = value, step

    def asks(self, flag: str) -> bool:
        """Return whether a callback has asked for `should_save` or `should_evaluate` in this step."""
        return bool(self.callbacks) and bool(getattr(self.control, flag))

    def call(self, event: str, **more: Any) -> None:
        """Call a hook of all callbacks, and agree with the other processes on what they ask for (collective).

        An error of the user's own is raised as it is, with a note that says where.
        """
        for callback in self.callbacks:
            hook = getattr(callback, event, None)
            if hook is None:
                continue
            before = self.control.should_training_stop
            try:
                answer = hook(self.args, self.state, self.control, **self.context, **more)
            except Exception as error:
                error.add_note(
                    f"raised by the callback {type(callback).__name__}.{event} after step {self.state.global_step}"
                )
                raise
            if answer is not None:
                if not all(hasattr(answer, flag) for flag in FLAGS):
                    raise RunFailed(
                        f"callback {type(callback).__name__}.{event} returned {answer!r}: return control, or nothing"
                    )
                self.control = answer
            if self.control.should_epoch_stop:
                raise RunFailed(
                    f"callback {type(callback).__name__}.{event} set control.should_epoch_stop, but epochs do not end "
                    "early here: set should_training_stop"
                )
            if self.control.should_training_stop and not before:
                self.asked_by = type(callback).__name__
        if self.callbacks:
            self._agree()

    def _agree(self) -> None:
        mine = {flag: getattr(self.control, flag) for flag in FLAGS} | {"asked_by": self.asked_by}
        if self.parallel.world > 1:
            everyone = self.parallel.gather_objects([mine])
            for flag in FLAGS:
                setattr(self.control, flag, any(each[flag] for each in everyone))
            self.asked_by = next((each["asked_by"] for each in everyone if each["asked_by"]), "")
        self.stops = bool(self.control.should_training_stop)

    # --- resuming ---

    def state_dict(self) -> dict[str, Any]:
        """Return what callbacks with transformers' `state()` want to keep, by their place and class."""
        found: dict[str, Any] = {}
        for k, callback in enumerate(self.callbacks):
            if callable(own := getattr(callback, "state", None)):
                kept: Any = own()
                found[f"{k} {type(callback).__name__}"] = dict(kept.get("attributes", {}))
        return found

    def load_state_dict(self, kept: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Restore from `state_dict`, and the rows of metrics so far."""
        if not self.callbacks:
            return
        self.state.log_history = [*history]
        for k, callback in enumerate(self.callbacks):
            for name, value in kept.get(f"{k} {type(callback).__name__}", {}).items():
                setattr(callback, name, value)


def _training_arguments(config: RunConfig) -> SimpleNamespace:
    """Return an object with transformers' names for what the configuration says; `config` is the configuration."""
    train, best = config.train, config.eval.keep_best
    return SimpleNamespace(
        config=config,
        output_dir=train.output_dir,
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        seed=train.seed,
        logging_steps=1,
        save_steps=train.save_steps,
        save_total_limit=train.save_total_limit or None,
        eval_steps=config.eval.steps or None,
        eval_strategy="steps" if config.eval.steps else "no",
        load_best_model_at_end=best is not None,
        metric_for_best_model=None if best is None else best.replace("eval/", "eval_", 1),
        greater_is_better=None if best is None else config.eval.better == "up",
        report_to=config.track.report_to,
        run_name=config.track.run_name,
    )
