"""Configurations of TRL: every field means an option, or is said to be unneeded, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl import Trainer
from llmrl.config import Config, preset
from llmrl.errors import UserError
from llmrl.run.from_trl.tables import INSTEAD, MORE, NOT_NEEDED, POLICY_GRADIENT, ROWS, SAME, SAMPLED
from llmrl.run.from_trl.translate import KNOWN, translate
from llmrl.run.given import Given, Resolved, resolve_config

ROWS_50 = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(50)]


def letters(completion: str) -> float:
    return sum(character.isalpha() for character in completion) / 16


def config(name: str, **fields: Any) -> Any:
    trl = pytest.importorskip("trl")
    import transformers

    cls = getattr(trl, name, None) or getattr(transformers, name)
    usual = {"output_dir": "out", "use_cpu": True} | ({"bf16": False} if name != "TrainingArguments" else {})
    return cls(**usual | fields)


def resolve(args: Any, **given: Any) -> Resolved:
    return resolve_config(args, Given(**{"model": "tiny:qwen2", "train_dataset": ROWS_50} | given))


def sampled(args: Any, **given: Any) -> Config:
    found = resolve(args, **{"reward": letters} | given).config
    assert isinstance(found, Config)
    return found


# --- nothing is dropped -----------------------------------------------------------------------------------------------

NAMES = ["TrainingArguments", "GRPOConfig", "DPOConfig", "KTOConfig"]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_installed_version_is_known(name: str) -> None:
    unknown = {f.name for f in dataclasses.fields(config(name))} - KNOWN
    assert not unknown


def test_no_name_is_in_two_tables() -> None:
    tables = [SAME, SAMPLED, POLICY_GRADIENT, ROWS, NOT_NEEDED, INSTEAD, MORE]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))


def other(name: str, value: Any) -> Any:
    """Return another value than `value`, of a plausible type."""
    named = {
        "loss_type": "sapo", "lr_scheduler_type": "cosine", "scale_rewards": "batch", "vllm_mode": "server",
        "eval_strategy": "epoch", "save_strategy": "no", "optim": "adafactor", "per_device_train_batch_size": 16,
        "multi_objective_aggregation": "normalize_then_sum", "importance_sampling_level": "sequence",
        "f_divergence_type": "forward_kl", "train_sampling_strategy": "group_by_length", "report_to": ["wandb"],
        "model_init_kwargs": {"attn_implementation": "eager"}, "num_generations": 4, "reward_weights": [2.0],
        "vllm_importance_sampling_mode": "token_truncate", "logging_strategy": "epoch", "beta": 0.3,
        "max_steps": 7, "generation_batch_size": 16, "loss_weights": [2.0], "chat_template_kwargs": {"a": 1},
        "vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_cap": 5.0, "vllm_server_base_url": "http://there:8000",
    }  # fmt: skip
    if name in named:
        return named[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "another" if isinstance(value, str) else 3


CONTEXT = {
    "vllm_": {"use_vllm": True},
    "sapo_": {"loss_type": "sapo"},
    "vespo_": {"loss_type": "vespo"},
    "entropy_": {"use_adaptive_entropy": True},
    "ref_model_": {"sync_ref_model": True},
    "use_bias_correction_kl": {"beta": 0.1},
    "f_alpha": {"f_divergence_type": "alpha_divergence"},
    "discopop": {"loss_type": ["discopop"]},
    "vllm_server": {"use_vllm": True, "vllm_mode": "server"},
    "eval_steps": {"eval_strategy": "steps"},
    "steps_per_generation": {"generation_batch_size": None},
    "greater_is_better": {"metric_for_best_model": "reward", "greater_is_better": True},
}
"""Prefix of a field -> the fields without which it is read by nothing, in TRL too."""


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_field_changes_an_option_or_is_named(name: str) -> None:
    usual, vanished = config(name), list[str]()
    for f in dataclasses.fields(usual):
        if f.name in ("do_eval", "use_cpu", "dataloader_pin_memory"):  # follow from others, or see below
            continue
        changed = copy.copy(usual)
        for prefix, fields in CONTEXT.items():
            if f.name.startswith(prefix):
                for key, value in fields.items():
                    if hasattr(changed, key):
                        setattr(changed, key, value)
        before = copy.copy(changed)
        setattr(changed, f.name, other(f.name, getattr(changed, f.name)))
        try:
            found = translate(changed)
        except UserError as error:
            assert f.name in str(error), f"{f.name}: {error}"
            continue
        try:
            plain = translate(before)
        except UserError:
            continue
        same = (found.options, found.epochs, found.reward_weights) == (
            plain.options,
            plain.epochs,
            plain.reward_weights,
        )
        named = any(f.name in note for note in found.notes)
        if f.name == "eval_steps" or not same or named:
            continue
        vanished.append(f.name)
    assert not vanished


# --- the right values -------------------------------------------------------------------------------------------------


def test_the_defaults_of_grpo_hold_where_they_are_others_than_ours() -> None:
    found = sampled(config("GRPOConfig"))
    assert found.algo == preset("grpo", aggregation="dapo")  # no penalty, a group's standard deviation, epsilon 0.2
    assert found.rollout.num_prompts == 1  # 8 completions in groups of 8
    assert (found.train.lr_scheduler_type, found.train.learning_rate, found.train.seed) == ("linear", 1e-6, 42)
    assert found.train.dropout and found.model.gradient_checkpointing
    assert (found.train.save_steps, found.train.save_total_limit) == (500, 0)
    assert resolve(config("GRPOConfig"), reward=letters).with_rows(50).train.max_steps == 150


@pytest.mark.parametrize(
    ("fields", "algo"),
    [
        ({"loss_type": "grpo", "beta": 0.04}, {"kl": {"beta": 0.04, "bias_correction": True}}),
        ({"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}, {"loss": {"epsilon": 0.1, "epsilon_high": 0.3}}),
        ({"loss_type": "dr_grpo", "scale_rewards": False}, {"aggregation": "dr_grpo", "baseline": {"scale": "none"}}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"aggregation": "dapo", "loss": {"kind": "cispo"}}),
        (
            {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
            {"loss": {"kind": "sapo", "temperature_neg": 2.0}},
        ),
        ({"loss_type": "vespo", "vespo_k_pos": 1.0}, {"aggregation": "dapo", "loss": {"kind": "vespo", "k_pos": 1.0}}),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence"},
            {"aggregation": "sequence_sum", "loss": {"ratio": "sequence"}},
        ),
        ({"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"}, {"baseline": "each_reward"}),
        ({"loss_type": "grpo", "entropy_coef": 0.01, "num_iterations": 3}, {"entropy_coef": 0.01, "num_iterations": 3}),
    ],
)
def test_losses_of_grpo(fields: dict[str, Any], algo: dict[str, Any]) -> None:
    two = [letters, "format_tags"]
    assert sampled(config("GRPOConfig", **fields), reward=two).algo == preset("grpo", **algo)


def test_losses_of_dpo_and_kto() -> None:
    dpo = resolve(config("DPOConfig", beta=0.2, label_smoothing=0.1, precompute_ref_log_probs=True)).config
    assert dpo.algo == preset(
        "dpo", loss={"beta": 0.2, "label_smoothing": 0.1}, precompute_ref_log_probs=True, max_length=1024
    )
    assert dpo.rollout.num_prompts == 8 and not dpo.train.dropout and dpo.data.shuffle
    mixed = resolve(config("DPOConfig", loss_type=["ipo", "sft"], loss_weights=[1.0, 0.5])).config
    terms = [{"kind": "ipo", "beta": 0.1}, {"kind": "sft", "weight": 0.5}]
    assert mixed.algo == preset("dpo", loss={"kind": "sum", "terms": terms})
    moving = resolve(config("DPOConfig", sync_ref_model=True, f_divergence_type="js_divergence")).config
    assert moving.algo == preset("dpo", reference={"steps": 512, "alpha": 0.6}, divergence="js_divergence")
    kto = resolve(config("KTOConfig", desirable_weight=1.5, loss_type="apo_zero_unpaired", max_length=None)).config
    loss = {"kind": "apo_zero_unpaired", "desirable_weight": 1.5}
    assert kto.algo == preset("kto", loss=loss, max_length=2**31 - 1)
    assert not kto.data.shuffle


def test_vllm_as_trl_runs_it() -> None:
    here = sampled(config("GRPOConfig", use_vllm=True, vllm_max_model_length=2048))
    assert here.rollout.engine == "vllm" and here.rollout.vllm is not None
    assert (here.rollout.vllm.gpu_memory_utilization, here.rollout.vllm.max_model_len) == (0.3, 2048)
    weights = {"kind": "weights", "of": "sequence", "outside": "mask", "low": 0.0, "high": 3.0}
    assert here.algo == preset("grpo", aggregation="dapo", sampler=weights)
    there = sampled(config("GRPOConfig", use_vllm=True, vllm_mode="server", vllm_server_port=8123))
    assert there.rollout.server is not None and there.rollout.server.urls == ["http://127.0.0.1:8123"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4, "num_iterations": 2},
        {"per_device_train_batch_size": 8, "steps_per_generation": 4, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 4, "generation_batch_size": 16, "gradient_accumulation_steps": 2,
         "num_generations": 8},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
    ],
)  # fmt: skip
@pytest.mark.slow
def test_epochs_are_as_many_optimizer_steps_as_in_trl(fields: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOTrainer  # pyright: ignore[reportMissingTypeStubs]

    from llmrl.tiny import build_tiny_model, byte_tokenizer

    tokenizer = byte_tokenizer()
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    args = config("GRPOConfig", output_dir=str(tmp_path), **fields)
    theirs = GRPOTrainer(
        model=build_tiny_model("qwen2", vocab_size=len(tokenizer), **tokens),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list(ROWS_50),
        processing_class=tokenizer,
    )
    updates = theirs.set_initial_training_values(args, theirs.get_train_dataloader())[-1]
    ours = resolve(args, reward=letters)
    final = ours.with_rows(50)
    assert ours.translated is not None
    per_batch = ours.translated.updates_per_batch
    assert (final.train.max_steps - 1) * per_batch < updates <= final.train.max_steps * per_batch
    completions = final.rollout.num_prompts * args.num_generations  # pyright: ignore
    assert completions * args.num_iterations == per_batch * args.per_device_train_batch_size * (
        args.gradient_accumulation_steps
    )


def test_steps_of_optimizers_become_steps_of_batches() -> None:
    fields = {
        "per_device_train_batch_size": 8, "steps_per_generation": 4, "num_generations": 8, "max_steps": 100,
        "save_steps": 0.25, "warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 10,
    }  # fmt: skip
    found = sampled(config("GRPOConfig", **fields), eval_dataset=ROWS_50[:4])
    assert (found.rollout.num_prompts, getattr(found.algo, "num_mini_batches", 0)) == (4, 4)
    assert found.train.max_steps == 25 and found.train.save_steps == 7 and found.eval.steps == 3
    assert found.train.warmup_steps == 10
    assert (found.eval.num_generations, found.eval.temperature) == (8, 1.0)


@pytest.mark.parametrize(
    ("name", "fields", "best"),
    [
        ("GRPOConfig", {"metric_for_best_model": "eval_reward"}, "eval/reward"),
        ("GRPOConfig", {"metric_for_best_model": "pass@8", "load_best_model_at_end": True}, "eval/pass@8"),
        ("GRPOConfig", {"load_best_model_at_end": True}, "eval/reward"),
        ("DPOConfig", {"load_best_model_at_end": True, "save_strategy": "best"}, "eval/loss"),
        ("DPOConfig", {"metric_for_best_model": "rewards/accuracies"}, "eval/accuracy"),
    ],
)
def test_the_best_model_and_an_evaluation_at_the_start(name: str, fields: dict[str, Any], best: str) -> None:
    usual = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "eval_on_start": True}
    given = {"reward": letters} if name == "GRPOConfig" else {}
    found = resolve(config(name, **usual | fields), eval_dataset=ROWS_50[:2], **given)
    assert (found.config.eval.keep_best, found.config.eval.at_start) == (best, True)
    assert any("kept in best/" in note for note in found.notes) == ("load_best_model_at_end" in fields)
    with pytest.raises(UserError, match="greater_is_better False: eval/reward is better when it goes up"):
        sampled({"metric_for_best_model": "reward", "greater_is_better": False, "eval_steps": 1})


def test_epochs_of_a_stream_have_no_length(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from ({"prompt": f"Count to {i}", "answer": str(i)} for i in itertools.count())

    datasets = pytest.importorskip("datasets")
    given: dict[str, Any] = {"model": "tiny:qwen2", "reward_funcs": letters, "args": {"num_train_epochs": 2}}
    with pytest.raises(UserError, match="args gives the length of the run in epochs, but the rows are a stream"):
        Trainer(train_dataset=datasets.IterableDataset.from_generator(rows), **given)
    given["args"] = {"max_steps": 1, "num_generations": 2, "rollout.num_prompts": 2, "output_dir": str(tmp_path / "r")}
    Trainer(train_dataset=datasets.IterableDataset.from_generator(rows), **given)


def test_completions_are_shown_where_they_are_asked_for() -> None:
    there = {"report_to": ["tensorboard"]}
    assert sampled(config("GRPOConfig", **there)).track.log_completions_steps == 0
    fields = {"log_completions": True, "logging_steps": 5, "chat_template_kwargs": {"thinking": False}}
    found = sampled(config("GRPOConfig", **there, **fields))
    assert found.track.log_completions_steps == 5
    notes = resolve(config("GRPOConfig", **fields), reward=letters).notes
    assert any("log_completions (rollouts.jsonl holds every completion" in note for note in notes)
    assert found.data.chat_template_kwargs == {"thinking": False}


def test_several_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 8}
    assert sampled(given).rollout.num_prompts == 4


def test_model_and_precision() -> None:
    import torch

    given = {"bf16": True, "model_init_kwargs": {"attn_implementation": "eager", "revision": "v2"}}
    model = sampled(given).model
    assert (model.dtype, model.attn_implementation, model.revision) == ("bfloat16", "eager", "v2")
    assert sampled({"model_init_kwargs": {"dtype": torch.bfloat16}}).model.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"model_init_kwargs device_count: load the model yourself"):
        sampled({"model_init_kwargs": {"device_count": 3}})


# --- dictionaries -----------------------------------------------------------------------------------------------------


def test_a_dictionary_stands_for_what_it_holds() -> None:
    found = sampled({"learning_rate": 1e-5, "max_steps": 7, "beta": 0.1, "train.weight_decay": 0.01})
    assert (found.train.learning_rate, found.train.max_steps, found.train.weight_decay) == (1e-5, 7, 0.01)
    assert found.algo == preset("grpo", kl={"beta": 0.1, "bias_correction": True})
    assert sampled({"num_generations": 3}).rollout.num_generations == 3
    assert (found.train.seed, found.rollout.num_prompts) == (0, 16)  # ours, where nothing is said
    assert resolve({"num_train_epochs": 2}, reward=letters).with_rows(50).train.max_steps == 2 * 50 // 16
    dpo = resolve({"loss_type": "ipo", "beta": 0.3}, algorithm="dpo").config
    assert dpo.algo == preset("dpo", loss={"kind": "ipo", "beta": 0.3})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rate": 1e-5, "train.learning_rate": 1e-6}, r"args has train.learning_rate and a name of TRL's"),
        ({"learning_rate": 1e-5, "train": {"learning_rate": 1e-6}}, r"args has train.learning_rate and"),
        ({"learning_rate": 1e-5, "min_p": 0.1}, r"min_p 0.1: rollouts are drawn from the policy itself"),
        ({"learning_rate": 1e-5, "label_smoothing": 0.1}, r"label_smoothing 0.1: algo.name grpo does not read it"),
        ({"learning_rate": 1e-5, "learning_rat": 1e-5}, r"learning_rat: there is no such option"),
        ({"loss_type": "bnpo"}, r"loss_type bnpo: use dapo"),
        ({"per_device_train_batch_size": 3}, r"3 completions are sampled at once .* groups of num_generations 8"),
        ({"optim": "adafactor"}, r"optim adafactor: AdamW is the optimizer"),
        ({"lr_scheduler_type": "polynomial"}, r"lr_scheduler_type polynomial: use constant, linear or cosine"),
        ({"top_p": 0.9}, r"rollout.top_p 0.9 .* cut the support"),
        ({"num_train_epochs": 0}, r"num_train_epochs 0: nothing would be trained"),
        ({"max_steps": "10"}, r"max_steps is '10': must be a number"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps is 0: must be a number, at least 1"),
        (
            {"num_generations": 0, "per_device_train_batch_size": 8},
            r"num_generations is 0: must be a number, at least 1",
        ),
        ({"reward_weights": "ab"}, r"reward_weights is 'ab': must be a list of numbers"),
        ({"model_init_kwargs": "ab"}, r"model_init_kwargs is 'ab': must be a dictionary"),
        ({"loss_type": ["grpo"]}, r"loss_type \['grpo'\]: there are grpo, dapo"),
        ({"learning_rate": "fast"}, r"train.learning_rate is 'fast': must be a number"),
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights has 2 entries for 1 rewards"),
    ],
)
def test_what_a_dictionary_may_not_hold(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampled(args)


def test_a_cpu_is_asked_for_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert sampled({"use_cpu": True}).algo.name == "grpo"  # there is nothing else here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(UserError, match="use_cpu True: set ACCELERATE_USE_CPU=true"):
        sampled({"use_cpu": True})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert sampled({"use_cpu": True}).algo.name == "grpo"


def test_weights_of_rewards() -> None:
    found = sampled({"reward_weights": [1.0, 0.5]}, reward=[letters, "format_tags"])
    assert [reward.weight for reward in found.rewards] == [1.0, 0.5]


# --- what else Trainer is called with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": letters, "reward_funcs": letters}, "two names for the same"),
        ({"ref_model": object()}, "ref_model: the reference is the policy as it started"),
        ({"tools": [letters]}, "tools: rollouts have one turn"),
        ({"environment_factory": object}, "environment_factory: rollouts have one turn"),
        ({"rollout_func": letters}, "rollout_func: the engine draws rollouts"),
        ({"train_datasets": []}, "train_datasets: there is no such argument; did you mean train_dataset"),
        ({"learning_rate": 1.0}, "learning_rate: that is an option; give it in args"),
        ({"algorithm": Trainer}, "algorithm is <class .*: give the name of a preset"),
        ({"algorithm": "grop"}, "algorithm is 'grop'; did you mean grpo"),
        ({"args": "Qwen/Qwen2.5-0.5B"}, "args is a model: that is Trainer"),
        ({"args": "run.yaml"}, "args is the name of a file"),
        ({"args": 5}, "args is of type int"),
    ],
)
def test_other_arguments_are_refused_with_what_takes_their_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(**{"model": "tiny:qwen2", "train_dataset": ROWS_50} | given)


def test_the_first_argument_is_the_configuration_or_as_in_trl_the_model(tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path / "a"), "max_steps": 1, "num_generations": 2, "rollout.num_prompts": 2}
    given: dict[str, Any] = {"reward_funcs": letters, "train_dataset": ROWS_50}
    for first, args in ((options, {"model": "tiny:qwen2"}), ("tiny:qwen2", {"args": options})):
        run = Trainer(first, **args, **given)
        assert (run.config.model.path, run.config.train.max_steps) == ("tiny:qwen2", 1)
    with pytest.raises(UserError, match="the model is given twice"):
        Trainer("tiny:qwen2", model="tiny:llama", **given)
    with pytest.raises(UserError, match="the configuration is given twice"):
        Trainer({}, args={}, **given)


def test_other_trainers_have_no_counterpart_of_that_name() -> None:
    with pytest.raises(UserError, match=r"args is a RLOOConfig: .* algo.name \(rloo"):
        resolve(config("RLOOConfig"), reward=letters)
    with pytest.raises(UserError, match=r"a DPOConfig, which describes dpo, but the algorithm asked for is grpo"):
        resolve(config("DPOConfig"), algorithm="grpo")
    with pytest.raises(UserError, match=r'eval_strategy is "no", so it would never be used'):
        sampled(config("GRPOConfig"), eval_dataset=ROWS_50)


def test_a_run_with_a_configuration_of_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = config(
        "GRPOConfig", output_dir=str(tmp_path / "run"), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, learning_rate=1e-3, num_train_epochs=1, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    Trainer(model="tiny:qwen2", reward_funcs=[letters], args=args, train_dataset=ROWS_50[:4]).train()
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["train"]["max_steps"] == 2 and recorded["rollout"]["num_prompts"] == 2
    assert recorded["algo"]["aggregation"] == "dapo"
    shown = capsys.readouterr().out
    assert "GRPOConfig means --algo.name grpo" in shown and "--algo.aggregation dapo" in shown
    assert "nothing takes the place of logging_steps (every step is logged)" in shown
    assert "GRPOConfig, for 4 rows: --train.max_steps 2" in shown
