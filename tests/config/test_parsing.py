"""The parser: one line for one mistake, what is left out, what is laid over what, files that are saved and loaded."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl.algo.policy_gradient.options import Cispo, Clip, Correction, PolicyGradient, Thr
from llmrl.config import (
    PRESETS,
    Config,
    EvalRun,
    LoraConfig,
    RewardConfig,
    RunConfig,
    SharedCritic,
    TrainConfig,
    check,
    from_dotted,
    load_config,
    parse,
    preset,
    save_config,
    to_dict,
)
from llmrl.config.parsing import with_algorithm
from llmrl.config.schema import walk
from llmrl.errors import UserError
from llmrl.option import option

BASE = ["--model.path=m", "--data.path=d", "--rewards=[{fn: 'r.py:f'}]"]
OFFLINE = BASE[:2]
FILE = "model: {path: m}\ndata: {path: d}\nrewards:\n- fn: r.py:f\n"
"""Four lines, so that what a test adds begins at line 5."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a YAML file and returns its path; `name` tells several apart."""

    def write(text: str, name: str = "c.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def message(*argv: str) -> str:
    """The one line of an error; "configuration: " is left out."""
    with pytest.raises(UserError) as caught:
        load_config(list(argv))
    (line,) = str(caught.value).splitlines()
    return line.removeprefix("configuration: ")


def load(*argv: str) -> Any:
    return load_config([*BASE, *argv])


# --- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        # typos
        ("--train.max_stepps 3", "train.max_stepps: there is no such option; did you mean train.max_steps?"),
        ("--tran.max_steps 3", "tran: there is no such option; did you mean train?"),
        ("--train.max-steps 3", "train.max-steps: there is no such option; did you mean train.max_steps?"),
        ("--Train.max_steps 3", "Train: there is no such option; did you mean train?"),
        ("--model.lora.rr 3", "model.lora.rr: there is no such option; did you mean model.lora.r?"),
        ("--algo.loss.epsilom 0.3", "algo.loss.epsilom: there is no such option; did you mean algo.loss.epsilon?"),
        ("--rewards [{fn:a,wieght:1}]", "rewards[0].wieght: there is no such option; did you mean rewards[0].weight?"),
        ("--foo.bar.baz 1", "foo: there is no such option; there are model, data, rollout"),
        # wrong choices
        ("--algo.name grop", "algo.name 'grop': there is no such preset; did you mean grpo?; there are grpo, dr_grpo"),
        ("--algo foo", "algo.name 'foo': there is no such preset"),
        ("--algo.loss cipso", "algo.loss.kind 'cipso': not one of clip, cispo, sapo, gmpo, vespo, clip_cov, kl_cov"),
        ("--algo.loss.kind null", "algo.loss.kind null: not one of clip, cispo"),
        ("--algo.kl none", "algo.kl.kind 'none': not one of loss, reward; null is off"),
        ("--rollout.engine vlm", "rollout.engine is 'vlm': must be one of hf, vllm, vllm_server; did you mean vllm?"),
        ("--model.dtype Float32", "model.dtype is 'Float32': must be one of float32, bfloat16; did you mean float32?"),
        # wrong types
        ("--train.max_steps abc", "train.max_steps is 'abc': must be a whole number"),
        ("--train.max_steps 1.5", "train.max_steps is '1.5': must be a whole number"),
        ("--train.max_steps null", "train.max_steps is null: must be a whole number"),
        ("--train.max_steps=", "train.max_steps is '': must be a whole number"),
        ("--train.learning_rate true", "train.learning_rate is 'true': must be a number"),
        ("--train.packing maybe", "train.packing is 'maybe': must be true or false"),
        ("--train 5", "train is '5': must be a mapping of options"),
        ("--algo.loss null", "algo.loss is null: must be one of the choices, or a mapping of options"),
        ("--algo.loss [clip]", "algo.loss is ['clip']: must be one of the choices, or a mapping of options"),
        ("--track.report_to wandv", "track.report_to: no tracker is called 'wandv'; did you mean 'wandb'?"),
        ("--track.project p", "track.project is set, but track.report_to names no tracker that would read it"),
        ("--eval.temperature 0.5", "eval.temperature is set but eval.data is not, so nothing is evaluated"),
        ("--rewards null", "rewards is null: must be a list"),
        ("--rewards [{fn:a,scale:3}]", "rewards[0].scale is 3: must be a list, such as '[0, 1]'"),
        ("--rewards [{fn:5}]", "rewards[0].fn is 5: must be text"),
        # ranges
        ("--train.max_steps 0", "train.max_steps is 0: must be at least 1"),
        ("--train.learning_rate -1", "train.learning_rate is -1: must be at least 0"),
        ("--train.learning_rate nan", "train.learning_rate is 'nan': must be a finite number"),
        ("--train.learning_rate inf", "train.learning_rate is 'inf': must be a finite number"),
        ("--train.adam_beta1 1", "train.adam_beta1 is 1: must be below 1"),
        ("--rollout.top_p 1.1", "rollout.top_p is 1.1: must be at most 1"),
        # options that the choices do not read
        ("--algo.loss.max_ratio 4", "algo.loss.max_ratio: not read by what was chosen, but by kind cispo: leave it"),
        ("--algo.loss.kind cispo --algo.loss.epsilon 1", "algo.loss.epsilon: not read by what was chosen, but by kind"),
        ("--critic.kind shared", "critic.kind: algo.name grpo does not read it; leave it out"),
        ("--algo.value.lam 1", "algo.value: not read by what was chosen, but by algo.name ppo, algo.name vapo"),
        ("--algo.name ppo --critic.path x --critic.kind shared", "critic.path: not read by what was chosen, but by"),
        # TRL's flat names
        ("--num_generations 4", "num_generations: did you mean rollout.num_generations"),
        ("--beta 0.1", "beta: did you mean algo.kl.beta (policy gradients) or algo.loss.beta (the DPO family)?"),
        ("--per_device_train_batch_size 4", "per_device_train_batch_size: did you mean rollout.num_prompts"),
        ("--epsilon_high 0.3", "epsilon_high: did you mean algo.loss.epsilon_high?"),
        ("--model_name_or_path m", "model_name_or_path: did you mean model.path?"),
        ("--learning_rate 1", "learning_rate: did you mean train.learning_rate"),
        # names of before
        ("--algo.epsilon 0.2", "algo.epsilon: now algo.loss.epsilon"),
        ("--algo.beta 0.2", "algo.beta: now algo.kl.beta (policy gradients) or algo.loss.beta (the DPO family)"),
        ("--algo.policy_loss cispo", "algo.policy_loss: now algo.loss.kind"),
        ("--critic.lam 0.9 --algo.name ppo", "critic.lam: now algo.value.lam"),
        ("--bcoder.stage policy", "bcoder.stage: now algo.stage.kind"),
        ("--preference.max_length 9", "preference.max_length: now algo.max_length"),
        # contradictions
        ("--algo.name gspo --algo.token_weighting thr", "algo.loss.ratio sequence cannot tell the tokens"),
        ("--rollout.temperature 0", "rollout.temperature is 0.0: greedy rollouts are all alike"),
        ("--eval.steps 5", "eval.steps is set but eval.data is not"),
        ("--algo.sampler.low 2", "algo.sampler: the bounds (low, high) are (2.0, 2.0)"),
        ("--model.path=", "model.path is not set: give a hub id or a local folder"),
        # not options at all
        ("train.max_steps 3", "'train.max_steps': options begin with --, such as --train.max_steps 100"),
        ("--train.max_steps", "--train.max_steps needs a value"),
        ("--algo..loss 1", "--algo..loss: not the name of an option"),
        ("-- x", "--: not the name of an option"),
        ("--config", "--config needs a value"),
        ("--config nope.yaml", "--config nope.yaml: no such file"),
        ("--print_config=no", "--print_config=no: --print_config takes no value"),
        # one value in the place of another
        ("--algo [dapo]", "algo.name ['dapo']: there is no such preset; did you mean dapo?"),
        ("--algo.name.foo 1", "algo.name {'foo': '1'}: there is no such preset"),
        ("--algo.loss.kind.foo 1", "algo.loss.kind {'foo': '1'}: not one of clip"),
        ("--algo.loss.epsilon.foo 4", "algo.loss.epsilon.foo: there is no such option; algo.loss.epsilon is a"),
        ("--rewards.0.fn x", "rewards.0.fn: rewards is a list: give it whole, such as --rewards '[{...}, {...}]'"),
        ("--rewards [{fn:a", "rewards is '[{fn: a': must be a list, such as '[a, b]' (not valid YAML or JSON: line 1"),
        ("--algo.loss {kind:", "algo.loss.kind '{kind:': not one of"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_with_the_path_and_the_fix(argv: str, said: str) -> None:
    words = [word.replace(":", ": ") if word.startswith("[{") else word for word in argv.split(" ")]
    found = message(*BASE, *words)
    assert found.startswith(said), found
    assert len(found) < 600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  max_stepz: 3\n", "train.max_stepz (FILE, line 6): there is no such option; did you mean train."),
        ("train:\n  seed: 0\n  max_steps: many\n", "train.max_steps (FILE, line 7) is 'many': must be a whole number"),
        ("train: {max_steps: yes}\n", "train.max_steps (FILE, line 5) is true: must be a number"),
        ("train:\n  max_steps: null\n", "train.max_steps (FILE, line 6) is null: must be a whole number"),
        ("train: 5\n", "train (FILE, line 5) is 5: must be a mapping of options"),
        ("algo: {loss: {kind: cispo, epsilon: 0.3}}\n", "algo.loss.epsilon (FILE, line 5): not read by what was"),
        ("algo:\n  kl:\n    kind: reward\n    estimator: k3\n", "algo.kl.estimator (FILE, line 8): not read by what"),
        ("algo:\n  name: dappo\n", "algo.name 'dappo' (FILE, line 6): there is no such preset; did you mean dapo?"),
        ("algo:\n  loss: clipp\n", "algo.loss.kind 'clipp' (FILE, line 6): not one of clip"),
        ("algo:\n  beta: 0.04\n", "algo.beta (FILE, line 6): now algo.kl.beta"),
        ("preference:\n  loss_weights: [1]\n", "preference.loss_weights (FILE, line 6): now the weight of each term"),
        ("num_generations: 4\n", "num_generations (FILE, line 5): did you mean rollout.num_generations"),
        ("train.max_steps: 3\n", "train.max_steps (FILE, line 5): there is no such option: options are nested here"),
        ("rollout: {engine: vllm, vllm: {extra: 3}}\n", "rollout.vllm.extra (FILE, line 5) is 3: must be a mapping"),
        ("train: {seed: 1}\nmodel: {path: x}\n", "FILE, line 6: model is there twice; remove one"),
        ("train:\n  seed: 1\n  seed: 2\n", "FILE, line 7: seed is there twice; remove one"),
        ("? [a, b]\n: 3\n", "FILE, line 5: a name has to be text"),
        ("train:\n\tseed: 1\n", "--config FILE: not valid YAML (line 6: found character"),
        ("---\ntrain: {}\n", "--config FILE: not valid YAML (line 5: but found another document)"),
        ("train: &t {seed: *t}\n", "--config FILE: not valid YAML ("),
        ("x: !!python/object/apply:os.system ['exit']\n", "x (FILE, line 5): there is no such option"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_with_file_and_line(text: str, said: str, write: Callable[..., str]) -> None:
    file = write(FILE + text)
    found = message("--config", file).replace(file, "FILE")
    assert found.startswith(said), found


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ("- fn: a\n  weight: 1\n- fn: b\n  weight: x\n", "rewards[1].weight (FILE, line 5) is 'x': must be a number"),
        (
            "- fn: a\n  weigth: 1\n",
            "rewards[0].weigth (FILE, line 3): there is no such option; did you mean rewards[0]",
        ),
        ("- fn: a\n  fn: b\n", "FILE, line 3: fn is there twice; remove one"),
        ("- a\n", "rewards[0] (FILE, line 1) is 'a': must be a mapping of options"),
        ("- {}\n", "rewards[0].fn is not set: such as rewards/math_answer.py:math_answer"),
    ],
)
def test_entries_of_a_list_have_their_lines(rewards: str, said: str, write: Callable[..., str]) -> None:
    file = write("rewards:\n" + rewards + "model: {path: m}\ndata: {path: d}\n")
    found = message("--config", file).replace(file, "FILE")
    assert found.startswith(said), found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "not valid YAML ('utf-8' codec"),
        (b"model: {path: \x00}\n", "not valid YAML (unacceptable character"),
        (b"[1, 2]\n", "must be a mapping of sections"),
        (b"5\n", "must be a mapping of sections"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "not valid YAML (nested too deeply)"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert said in message("--config", str(file))
    assert "is a folder" in message("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train.max_steps": True}, "train.max_steps is true: must be a number"),
        ({"train.max_steps": [1]}, "train.max_steps is [1]: must be a whole number"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate is nan: must be a finite number"),
        ({"train": {"max_stepps": 1}}, "train.max_stepps: there is no such option; did you mean train.max_steps?"),
        ({"train": None}, "train is null: must be a mapping of options"),
        ({"algo": None}, "algo.name null: there is no such preset"),
        ({"algo": PolicyGradient}, "algo.name <class"),
        ({"algo.loss": Clip}, "algo.loss is <class"),
        ({"algo.loss": {"kind": Clip}}, "algo.loss.kind <class"),
        ({"algo.loss": {"epsilon": {"a": 1}}}, "algo.loss.epsilon.a: there is no such option; algo.loss.epsilon is a"),
        ({"rewards": RewardConfig(fn="a")}, "rewards is RewardConfig("),
        ({"rewards": [len]}, "rewards[0] is <built-in function len>: must be a mapping of options"),
        ({"rollout.engine": b"vllm"}, "rollout.engine is b'vllm': must be one of hf, vllm, vllm_server"),
        ({"model.path": "x" * 10_000, "model.dtype": "y" * 10_000}, "model.dtype is 'yyyyy"),
        ({5: 3}, "5: there is no such option"),
    ],
)
def test_a_wrong_dictionary_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dotted(given)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"configuration: {said}") and len(line) < 600


def test_all_findings_come_at_once(write: Callable[..., str]) -> None:
    file = write("train:\n  max_stepz: 3\n  seed: x\nalgo:\n  loss: cipso\n  whiten: perhaps\nfoo: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(["--config", file, "--model.dtype", "int8", "--rewards", "[{weight: a}]"])
    head, *lines = str(caught.value).splitlines()
    assert head == "configuration:" and all(line.startswith("  - ") for line in lines)
    paths = [re.split(r"[ :]", line[4:])[0] for line in lines]
    assert sorted(paths) == [
        "algo.loss.kind", "algo.whiten", "foo", "model.dtype", "rewards[0].weight", "train.max_stepz", "train.seed",
    ]  # fmt: skip


# --- one file for several kinds of run --------------------------------------------------------------------------------

SHARED = (
    FILE + "rollout:\n  num_prompts: 8\n  num_generations: 4\nverify: {num_workers: 2}\ncritic: {kind: shared}\n"
    "eval: {steps: 2, num_generations: 3, data: {path: e, answer_column: a}}\n"
)


def test_a_file_serves_kinds_of_run_that_read_less_of_it(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(SHARED)
    sampled = load_config(["--config", file])
    assert type(sampled) is Config and sampled.rollout.num_generations == 4 and sampled.critic is None
    assert capsys.readouterr().err.splitlines() == ["note: this kind of run does not read critic.kind: left out"]
    assert isinstance(load_config(["--config", file, "--algo.name", "ppo"]).critic, SharedCritic)
    assert capsys.readouterr().err == ""
    offline = load_config(["--config", file, "--algo.name", "dpo"])
    assert type(offline) is RunConfig and offline.rollout.num_prompts == 8
    assert offline.eval.data is not None and offline.eval.data.path == "e"
    (note,) = capsys.readouterr().err.splitlines()
    for name in ("rewards", "rollout.num_generations", "verify.num_workers", "critic.kind", "eval.num_generations"):
        assert name in note
    assert "eval.data" in note, "a column of tasks"


def test_what_is_typed_for_this_run_has_to_be_read(write: Callable[..., str]) -> None:
    argv = ["--config", write(SHARED), "--algo.name", "dpo", "--rollout.num_generations", "3"]
    assert message(*argv) == "rollout.num_generations: algo.name dpo does not read it; leave it out"
    assert message(*argv[:-2], "--eval.data.answer_column", "p").startswith("eval.data.answer_column: algo.name dpo")


def test_typos_are_found_where_the_other_kind_of_run_is_chosen(write: Callable[..., str]) -> None:
    file = write(FILE + "rollout: {num_generationz: 4}\n")
    assert "did you mean rollout.num_generations" in message("--config", file, "--algo.name", "dpo")


def test_the_note_comes_from_one_process(write: Callable[..., str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    load_config(["--config", write(SHARED), "--algo.name", "dpo"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "argv", "left_out"),
    [
        ("loss: {kind: clip, epsilon: 0.3}", "--algo.loss cispo", "algo.loss.epsilon"),
        ("loss: {epsilon: 0.3}", "--algo.loss.kind cispo", "algo.loss.epsilon"),
        ("loss: {epsilon: 0.3}", "--algo.loss {kind:cispo,max_ratio:3}", "algo.loss.epsilon"),
        ("baseline: {scale: none}", "--algo.name rloo", "algo.baseline.scale"),
        ("baseline: {scale: none}", "--algo.name ppo", "algo.baseline:"),
        ("kl: {estimator: k2}", "--algo.kl reward", "algo.kl.estimator"),
        ("token_weighting: {kind: thr, p: 0.3}", "--algo.token_weighting nthr", "algo.token_weighting.p"),
        ("{name: dpo, loss: {kind: ipo, beta: 0.3}}", "--algo.name grpo", "algo.loss.kind, algo.loss.beta"),
        ("{name: dpo, loss: ipo}", "--algo.name grpo", "algo.loss.kind"),
        ("{loss: clip}", "--algo.name online_dpo", "algo.loss.kind"),
        ("{loss: {kind: clip, epsilon: 0.3}}", "--algo.name online_dpo", "algo.loss.kind, algo.loss.epsilon"),
        ("{name: dpo, loss: {kind: ipo, beta: 3}}", "--algo.name grpo --algo.loss.epsilon 1", "algo.loss.kind, algo"),
    ],
)  # fmt: skip
def test_a_choice_made_later_leaves_out_what_was_for_the_other(
    text: str, argv: str, left_out: str, write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(FILE + f"algo: {text if text.startswith('{') else '{' + text + '}'}\n")
    words = [word.replace(":", ": ").replace(",", ", ") for word in argv.split(" ")]
    config = load_config(["--config", file, *words])
    assert f"does not read {left_out}" in capsys.readouterr().err
    assert config == load_config([*BASE, *words]), "as if the file had not had it"


@pytest.mark.parametrize("argv", ["", "--algo.loss.kind cispo"])
def test_a_contradiction_in_one_place_is_an_error(argv: str, write: Callable[..., str]) -> None:
    file = write(FILE + "algo: {loss: {kind: cispo, epsilon: 0.3}}\n")
    if not argv:
        assert "algo.loss.epsilon" in message("--config", file)
        return
    said = message("--config", write(FILE), *argv.split(" "), "--algo.loss.epsilon", "0.3")
    assert said.startswith("algo.loss.epsilon: not read by what was chosen")


def test_a_typo_beside_a_choice_made_later_is_still_found(write: Callable[..., str]) -> None:
    file = write(FILE + "algo: {loss: {epsilom: 0.3}}\n")
    assert "did you mean algo.loss" in message("--config", file, "--algo.loss", "cispo")


def test_a_preset_chosen_later_keeps_what_it_reads(write: Callable[..., str]) -> None:
    file = write(FILE + "algo: {name: dapo, loss: {epsilon: 0.1}, overlong_buffer: 0.3}\n")
    config = load_config(["--config", file, "--algo.name", "gspo"])
    assert config.algo == preset("gspo", loss={"epsilon": 0.1}, overlong_buffer=0.3)


# --- what is laid over what -------------------------------------------------------------------------------------------


def test_several_files(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    first = write(FILE + "algo: {name: dapo, loss: {epsilon: 0.3}}\ntrain: {seed: 1, max_steps: 5}\n", "first.yaml")
    second = write("model: {path: other}\nalgo: {loss: cispo}\ntrain: {seed: 2}\n", "second.yaml")
    found = load_config(["--config", first, "--config", second, "--train.max_steps", "7"])
    assert (found.model.path, found.train.seed, found.train.max_steps) == ("other", 2, 7)
    assert found.algo == preset("dapo", loss="cispo")
    assert "algo.loss.epsilon: left out" in capsys.readouterr().err
    turned = message("--config", second, "--config", first)
    assert turned.startswith(f"algo.loss.epsilon ({first}, line 5): not read by what was chosen")


def test_lists_are_replaced_and_mappings_merged(write: Callable[..., str]) -> None:
    file = write(FILE + "rollout:\n  engine: vllm\n  vllm: {extra: {a: {b: 1, c: 2}}}\n")
    argv = ["--rewards", "[{fn: x, weight: 2}]", "--rollout.vllm.extra.a.b", "3", "--rollout.vllm.extra.d", "text"]
    found = load_config(["--config", file, *argv])
    assert [(reward.fn, reward.weight) for reward in found.rewards] == [("x", 2.0)]
    assert found.rollout.vllm.extra == {"a": {"b": 3, "c": 2}, "d": "text"}


def test_short_forms_of_a_choice() -> None:
    expected = PolicyGradient(loss=Cispo(max_ratio=4.0))
    for words in (
        ["--algo.loss", "cispo", "--algo.loss.max_ratio", "4"],
        ["--algo.loss.max_ratio", "4", "--algo.loss", "cispo"],
        ["--algo.loss.kind=cispo", "--algo.loss.max_ratio=4"],
        ["--algo.loss", '{"kind": "cispo", "max_ratio": 4}'],
        ["--algo.loss", "{kind: cispo, max_ratio: 4}"],
        ["--algo", "{loss: {kind: cispo, max_ratio: 4}}"],
    ):
        assert load(*words).algo == expected
    assert load("--algo", "dapo").algo == load("--algo.name", "dapo").algo == PRESETS["dapo"]
    assert load("--algo.token_weighting", "thr").algo.token_weighting == Thr()
    assert load("--algo.sampler", "{of: sequence}").algo.sampler == Correction(of="sequence")


def test_null_true_and_braces() -> None:
    assert load("--algo.name", "dapo", "--algo.dynamic_sampling", "null").algo.dynamic_sampling is None
    assert load("--algo.name", "dapo", "--algo.loss.dual_clip=null").algo.loss.dual_clip is None
    assert load("--algo.name", "rloo", "--algo.kl", "null").algo.kl is None
    assert load("--model.lora", "{}").model.lora == LoraConfig() == load("--model.lora", "true").model.lora
    assert load("--model.lora", "{r: 4}", "--model.lora", "null").model.lora is None
    assert load("--model.lora.r", "4", "--model.lora.target_modules", "[q, v]").model.lora.target_modules == ["q", "v"]
    assert load("--data.system_prompt", "null").data.system_prompt is None


def test_a_null_of_a_file_is_undone_by_an_option_below(write: Callable[..., str]) -> None:
    file = write(FILE + "algo: {kl: null}\n")
    assert load_config(["--config", file, "--algo.kl.beta", "0.2"]).algo.kl.beta == 0.2


def test_an_empty_section_of_a_file_is_its_defaults(write: Callable[..., str]) -> None:
    assert load_config(["--config", write(FILE + "train:\n  # seed: 3\nalgo:\n")]) == load()


def test_texts_with_brackets_stay_texts() -> None:
    for text in ("{prompt}", "{prompt} Answer:", "[x] {y", "[a, b]", '{"a": 1}', "null and void", "{{x}}"):
        assert load("--data.prompt_template", text).data.prompt_template == text
    twice = load("--data.prompt_template", "{a}", "--data.prompt_template", "{b}")
    assert twice.data.prompt_template == "{b}", "the later one wins"
    assert load("--model.path", "123").model.path == "123"
    assert load("--data.system_prompt", "true").data.system_prompt == "true"


def test_numbers_as_people_write_them(write: Callable[..., str]) -> None:
    assert load("--train.learning_rate", "1e-6").train.learning_rate == 1e-6
    assert load("--train.max_steps", "20").train.max_steps == 20
    for text in ("1e-6", "1.0e-06", "'1e-6'", "0.000001"):
        assert (
            load_config(["--config", write(FILE + f"train: {{learning_rate: {text}}}\n")]).train.learning_rate == 1e-6
        )
    assert load_config(["--config", write(FILE + "train: {max_steps: 1e3}\n")]).train.max_steps == 1000


def test_anchors_and_merge_keys(write: Callable[..., str]) -> None:
    text = "model: &m {path: m}\ndata:\n  limit: 3\n  <<: *m\nrewards: [&r {fn: a}, {<<: *r, weight: 0}]\n"
    found = load_config(["--config", write(text)])
    assert (found.data.path, found.data.limit) == ("m", 3)
    assert [(reward.fn, reward.weight) for reward in found.rewards] == [("a", 1.0), ("a", 0.0)]


def test_option_classes_in_a_dictionary(tmp_path: Path) -> None:
    def algo(**given: Any) -> Any:
        return from_dotted({name.replace("__", "."): value for name, value in given.items()}).algo

    assert algo(algo=PolicyGradient(loss=Cispo())) == algo(algo__loss=Cispo()) == algo(algo__loss="cispo")
    assert algo(algo=preset("dapo"), algo__whiten=True) == preset("dapo", whiten=True), "what is below is laid over it"
    off = dataclasses.replace(preset("dapo"), dynamic_sampling=None)
    assert algo(algo=off, algo__whiten=True) == preset("dapo", whiten=True, dynamic_sampling=None)
    found = from_dotted({"train": TrainConfig(max_steps=5), "train.seed": 3, "train.output_dir": tmp_path})
    assert (found.train.max_steps, found.train.seed, found.train.output_dir) == (5, 3, str(tmp_path))
    assert from_dotted({"model.lora": LoraConfig(r=4)}).model.lora == from_dotted({"model.lora.r": 4}).model.lora
    assert from_dotted({"algo": "ppo", "critic": SharedCritic()}).critic == SharedCritic(learning_rate=1e-6)
    assert from_dotted({"rewards": [RewardConfig(fn=len), {"fn": len}]}).rewards == [RewardConfig(fn=len)] * 2


def test_defaults_that_depend_on_other_sections() -> None:
    assert load().algo.sampler is None
    assert load("--rollout.max_staleness", "1").algo.sampler == Correction()
    assert load("--rollout.max_staleness", "1", "--algo.sampler", "none").algo.sampler.kind == "none"
    ppo = ["--algo.name", "ppo", "--train.learning_rate", "0.5"]
    assert load(*ppo).critic.learning_rate == 0.5
    assert load(*ppo, "--critic.learning_rate", "0").critic.learning_rate == 0.0


@pytest.mark.parametrize("config_class", [EvalRun])
def test_other_option_classes_are_parsed_alike(config_class: type) -> None:
    found = parse(["--model.path", "m", "--ks", "[1, 4]", "--rollout.num_generations", "4"], config_class=config_class)
    assert (found.model.path, found.ks, found.rollout.num_generations) == ("m", [1, 4], 4)
    with pytest.raises(UserError, match=r"ks\[0\] is 0: must be at least 1"):
        parse(["--ks", "[0]"], config_class=config_class)
    with pytest.raises(UserError, match="rollout.num_prompts: there is no such option|did you mean"):
        parse(["--rollout.num_prompts", "3"], config_class=config_class)


# --- out --------------------------------------------------------------------------------------------------------------

OVERRIDES = [
    "--algo.name dapo --algo.dynamic_sampling null --algo.loss.dual_clip null",
    "--algo.name rloo --algo.kl null",
    "--algo.name thr --algo.token_weighting null",
    "--algo.name c_grpo --algo.rubric null",
    "--algo.name passk --algo.loss.epsilon_high null",
    "--algo.name vapo --algo.warmup null --algo.value.length_alpha null --algo.value.lam_critic null",
    "--algo.name ppo --critic.kind adapter --model.lora {r:3}",
    "--algo.name ppo --critic.kind shared --algo.value.coef 0.3",
    "--algo.name grpo --algo.loss cispo --algo.kl reward --algo.sampler {of:sequence,high:3}",
    "--algo.name grpo --rollout.max_staleness 1",
    "--algo.name online_dpo --algo.hierarchy [{part:a,margin:0.5},{part:b}] --algo.reference {steps:3}",
    "--algo.name bcoder --algo.stage policy --algo.stage.ce_coef 0.1",
    "--rollout.engine vllm --rollout.vllm {extra:{a:[1,{b:null}]}}",
    "--data.prompt_template {prompt} --data.limit 3 --track.report_to [wandb,tensorboard]",
]  # fmt: skip


@pytest.mark.parametrize("argv", [*(f"--algo.name {name}" for name in PRESETS), *OVERRIDES])
def test_what_was_saved_is_loaded_again(argv: str, tmp_path: Path) -> None:
    words = [w.replace(":", ": ").replace(",", ", ") if w[:1] in "[{" else w for w in argv.split(" ")]
    name = words[words.index("--algo.name") + 1] if "--algo.name" in words else "grpo"
    offline = name in ("dpo", "cdpo", "ipo", "simpo", "orpo", "kto")
    base = OFFLINE if offline else [*OFFLINE, "--rewards=[{fn: 'a.py:a', args: {x: null}}, {fn: b, scale: [0, 2]}]"]
    config = parse([*base, *words])
    file = tmp_path / "config.yaml"
    save_config(config, file)
    again = parse(["--config", str(file)])
    assert again == config and type(again) is type(config)
    assert parse(["--config", str(file), "--config", str(file)]) == config
    save_config(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == file.read_text()
    assert from_dotted(to_dict(config)) == config
    assert "null" not in file.read_text().replace("x: null", "").replace("b: null", "") or "null" in argv


def test_a_saved_configuration_holds_what_applies(tmp_path: Path) -> None:
    save_config(load_config([*OFFLINE, "--algo.name", "dpo"]), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "null" not in text
    found = yaml.safe_load(text)
    assert list(found) == ["model", "data", "rollout", "algo", "train", "eval", "track"]
    assert found["rollout"] == {"num_prompts": 16}
    assert found["algo"]["loss"] == {"kind": "sigmoid", "weight": 1.0, "beta": 0.1, "label_smoothing": 0.0}
    assert len(text.splitlines()) < 65


def test_a_configuration_saved_by_hand_in_unicode(tmp_path: Path) -> None:
    config = load("--data.system_prompt", "Rechne: 3 \u00d7 4 \u2192 {x}\n\u00a0: #")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


# --- printed ----------------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        load_config(list(argv), prog="recipes/train.py")
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_print_config(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--print_config", *BASE, "--algo", "gspo", "--train.seed", "3")
    config = load("--algo", "gspo", "--train.seed", "3")
    assert load_config(["--config", write("\n".join(lines))]) == config
    assert yaml.safe_load("\n".join(lines)) == to_dict(config)
    assert message("--print_config", "--model.dtype", "int8").startswith("model.dtype is 'int8'")


@pytest.mark.parametrize("name", PRESETS)
def test_help_is_short_and_has_what_was_chosen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--algo.name", name, "--help")
    assert 20 < len(lines) < 120 and max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert lines[0].startswith("usage: recipes/train.py") and f"by the preset {name}" in text
    for field in dataclasses.fields(PRESETS[name]):
        assert field.name == "name" or f"  {field.name} = " in text


@pytest.mark.parametrize(
    ("section", "has"),
    [
        ("algo", ["--algo.aggregation", "--algo.value", "--algo.stage", "and as above", "by algo.name ppo, vapo"]),
        ("train", ["--train.learning_rate  (number, at least 0; default 1e-06)  AdamW's learning rate"]),
        ("algo.loss", ["algo.loss kind cispo", "--algo.loss.max_ratio", "algo.loss kind ipo", "--algo.loss.tau"]),
        ("algo.loss.cispo", ["--algo.loss.max_ratio"]),
        ("algo.kl", ["--algo.kl.estimator", "kind reward"]),
        ("critic", ["critic kind shared", "--critic.train_trunk"]),
        ("rewards", ["--rewards.fn", "--rewards.weight"]),
        ("model.lora", ["--model.lora.r  (int, at least 1; default 16)  Rank."]),
        ("train.seed", ["--train.seed"]),
        ("algo.name", ["--algo.name"]),
    ],
)
def test_help_of_a_section(section: str, has: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--help", section)
    assert 0 < len(lines) < 120 and max(map(len, lines)) <= 120
    assert [text for text in has if text not in "\n".join(lines)] == []
    assert printed(capsys, f"--help={section}") == lines


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("trian", "--help trian: there is no option trian; did you mean train?"),
        ("algo.los", "--help algo.los: there is no option los; did you mean loss?"),
        ("algo.loss.nope.x", "--help algo.loss.nope.x: there is no option nope"),
        ("train.seed.x", "--help train.seed.x: there is no option x"),
    ],
)
def test_help_of_what_is_not_there(section: str, said: str) -> None:
    assert message("--help", section).startswith(said)


def test_help_does_not_mind_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--help", "--model.dtype", "int8", "--foo", "1")[0].startswith("usage:")


# --- how much it takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--help", "algo"],
        [*BASE, "--print_config"],
        [*BASE, "--algo", "vapo", "--algo.loss", "cipso"],
        BASE,
    ],
    ids=" ".join,
)
def test_no_torch_is_imported(argv: list[str]) -> None:
    code = (
        "import sys, llmrl.config\n"
        "try: llmrl.config.load_config(sys.argv[1:])\n"
        "except (SystemExit, llmrl.config.parsing.UserError): pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'jsonargparse', 'vllm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, stdout=subprocess.DEVNULL, env=os.environ)


def test_defaults_have_the_types_of_their_fields() -> None:
    """Defaults are not checked when an option is made: an int in place of a float would be saved as another text."""
    classes = [Config, RunConfig, EvalRun, *{type(options): 0 for options in PRESETS.values()}]
    for path, field in [item for cls in classes for item in walk(cls)]:
        if not field.members and "float" in str(field.hint):
            assert type(field.default) is not int, path


def test_what_fits_together_is_checked_after_parsing() -> None:
    config = parse(BASE[:1])
    with pytest.raises(UserError, match="data.path is not set"):
        check(config)


def test_another_algorithm_keeps_what_was_changed_and_what_it_reads() -> None:
    config = dataclasses.replace(
        parse([*BASE, "--train.max_steps=7"]), algo=preset("grpo", kl={"beta": 0.04}, num_iterations=2)
    )
    found = with_algorithm(config, "dapo")
    assert (found.algo.name, found.algo.beta, found.algo.num_iterations) == ("dapo", 0.04, 2)
    assert (found.algo.loss.dual_clip, found.train.max_steps) == (10.0, 7)
    offline = with_algorithm(config, "dpo")
    assert type(offline) is RunConfig and offline.algo.num_iterations == 2 and offline.train.max_steps == 7
    assert type(with_algorithm(offline, "grpo")) is Config


@option
class Recipe(Config):
    """A recipe with an option of its own."""

    extra: int = 1


def test_another_algorithm_keeps_the_options_of_a_recipe() -> None:
    found = with_algorithm(Recipe(extra=5), "dapo")
    assert type(found) is Recipe and found.extra == 5 and found.algo.name == "dapo"
