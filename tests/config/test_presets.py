"""Presets: the values they had before options became unions, what is given on top, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.algo.policy_gradient import options as policy_gradient
from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    PreferenceData,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    check,
    complete,
    findings,
    load_config,
    preset,
    save_config,
)
from llmrl.config.config import run_class
from llmrl.config.describe import describe
from llmrl.errors import UserError

REQUIRED = [
    "grpo",
    "dr_grpo",
    "dapo",
    "lite_ppo",
    "gspo",
    "gspo_token",
    "cispo",
    "sapo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "passk",
    "thr",
    "c_grpo",
]
BEFORE: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("presets_before.json").read_text(encoding="utf-8")
)
"""By preset and section: what the flat options of 0.1.0 were filled with, without those that had no reader.

`online_kto` was `algo.name kto` with `preference.source rollouts`.
"""


def make_config(
    name: str = "grpo", *, size: int = 8, num_prompts: int = 16, rewards: int = 2, **algo: Any
) -> RunConfig:
    options = preset(name, **algo)
    model, data = ModelConfig(path="m"), DataConfig(path="d")
    if run_class(options) is RunConfig:
        return RunConfig(model=model, data=PreferenceData(path="d"), algo=options)
    return complete(
        Config(
            model=model,
            data=data,
            rollout=RolloutConfig(num_generations=size),
            rewards=[RewardConfig(fn=f"rewards/r.py:r{i}") for i in range(rewards)],
            algo=options,
        )
    )


# --- the values of before ---------------------------------------------------------------------------------------------

SAME = [
    "name", "overlong_buffer", "mask_truncated_completions", "entropy_coef", "top_entropy_quantile", "num_iterations",
    "num_mini_batches", "use_token_rewards", "positive_lm_coef",
]  # fmt: skip
ALGO: dict[str, str] = {name: f"algo.{name}" for name in SAME} | {
    "baseline": "algo.baseline.kind",
    "scale_rewards": "algo.baseline.scale",
    "batch_std_of": "algo.baseline.batch_std_of",
    "whiten_advantages": "algo.whiten",
    "passk_k": "algo.baseline.k",
    "passk_mix": "algo.baseline.mix",
    "gamma": "algo.baseline.gamma",
    "rubric_alpha": "algo.rubric.alpha",
    "rubric_norm": "algo.rubric.norm",
    "dynamic_sampling": "algo.dynamic_sampling",
    "dynamic_sampling_max_batches": "algo.dynamic_sampling.max_batches",
    "policy_loss": "algo.loss.kind",
    "importance_sampling_level": "algo.loss.ratio",
    "loss_type": "algo.aggregation",
    "epsilon": "algo.loss.epsilon",
    "epsilon_high": "algo.loss.epsilon_high",
    "dual_clip": "algo.loss.dual_clip",
    "max_ratio": "algo.loss.max_ratio",
    "sapo_temperature_pos": "algo.loss.temperature_pos",
    "sapo_temperature_neg": "algo.loss.temperature_neg",
    "vespo_k_pos": "algo.loss.k_pos",
    "vespo_lambda_pos": "algo.loss.lambda_pos",
    "vespo_k_neg": "algo.loss.k_neg",
    "vespo_lambda_neg": "algo.loss.lambda_neg",
    "cov_fraction": "algo.loss.fraction",
    "kl_cov_coef": "algo.loss.coef",
    "vllm_importance_sampling_mode": "algo.sampler",
    "beta": "algo.kl.beta",
    "kl_in": "algo.kl.kind",
    "kl_estimator": "algo.kl.estimator",
    "use_bias_correction_kl": "algo.kl.bias_correction",
    "token_weighting": "algo.token_weighting.kind",
    "thr_p": "algo.token_weighting.p",
    "thr_threshold": "algo.token_weighting.threshold",
    "thr_threshold_value": "algo.token_weighting.threshold_value",
}
CRITIC = {
    "kind": "critic.kind",
    "learning_rate": "critic.learning_rate",
    "value_clip": "algo.value.clip",
    "gamma": "algo.value.gamma",
    "lam": "algo.value.lam",
    "length_alpha": "algo.value.length_alpha",
    "lam_critic": "algo.value.lam_critic",
    "warmup_steps": "algo.warmup.steps",
    "warmup_iterations": "algo.warmup.iterations",
    "warmup_explained_variance": "algo.warmup.explained_variance",
}
PREFERENCE = {
    "loss_type": "algo.loss.kind",
    "loss_weights": "algo.loss.weight",
    "beta": "algo.loss.beta",
    "label_smoothing": "algo.loss.label_smoothing",
    "f_divergence_type": "algo.divergence.kind",
    "use_weighting": "algo.use_weighting",
    "max_length": "algo.max_length",
    "precompute_ref_log_probs": "algo.precompute_ref_log_probs",
    "ref_model_sync_steps": "algo.reference.steps",
    "pairs": "algo.pairs",
    "min_margin": "algo.min_margin",
    "simpo_gamma": "algo.loss.gamma",
    "desirable_weight": "algo.loss.desirable_weight",
    "undesirable_weight": "algo.loss.undesirable_weight",
    "desirable_above": "algo.desirable_above",
}
BCODER = {
    "stage": "algo.stage.kind",
    "alpha": "algo.alpha",
    "gamma": "algo.gamma",
    "real_frac": "algo.real_frac",
    "solution_column": "algo.solution_column",
}
PATHS = {"algo": ALGO, "critic": CRITIC, "preference": PREFERENCE, "bcoder": BCODER}
"""By section: name of an option before -> its path now."""

OFF = {
    "algo.rubric.alpha": 0.0,
    "algo.dynamic_sampling": False,
    "algo.sampler": "none",
    "algo.kl.beta": 0.0,
    "algo.token_weighting.kind": "none",
    "algo.warmup.steps": 0,
    "algo.reference.steps": 0,
}
"""Values that meant "off": now the option around them is null."""
UNREAD = {
    "algo.baseline.batch_std_of": "raw",
    "algo.kl.horizon": 10_000,
    "algo.token_weighting.p_steps": 100,
    "algo.divergence.kind": "reverse_kl",
    "algo.precompute_ref_log_probs": False,
}
"""Options of now that nothing reads beside a preset's other choices and that had no value: their defaults."""


def leaves(value: Any, path: str) -> dict[str, Any]:
    """Every option by its dotted path; a null option and an empty choice are leaves too."""
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}[{i}]").items()}
    if not dataclasses.is_dataclass(value):
        return {path: value}
    return {
        k: v for f in dataclasses.fields(value) for k, v in leaves(getattr(value, f.name), f"{path}.{f.name}").items()
    }


def translated(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options of before by their paths of now."""
    found = {PATHS[s][name]: v for s, options in sections.items() for name, v in options.items() if name in PATHS[s]}
    algo = sections["algo"]
    if algo.get("multi_objective_aggregation") == "normalize_then_sum":
        found["algo.baseline.kind"] = "each_reward"
    if algo.get("baseline") == "none" and found.pop("algo.use_token_rewards"):  # that is a baseline of its own now
        found["algo.baseline.kind"] = "token_rewards"
        del found["algo.baseline.scale"]
    if algo.get("baseline") == "critic":  # PPO has no other
        del found["algo.baseline.kind"]
    if algo.get("kl_in") == "reward":
        assert found.pop("algo.kl.estimator") == "k1"  # the only one there
    if "preference" in sections:
        kinds, weights = found.pop("algo.loss.kind"), found.pop("algo.loss.weight")
        if len(kinds) > 1:
            found["algo.loss.kind"] = "sum"
            for i, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
                found |= {f"algo.loss.terms[{i}].kind": kind, f"algo.loss.terms[{i}].weight": weight}
        else:
            found["algo.loss.kind"] = kinds[0]
            assert weights == [1.0]
    for path, off in OFF.items():
        if path in found and found[path] == off and type(found[path]) is type(off):
            del found[path]
            outer = path if path.count(".") == 1 else path.rpartition(".")[0]
            found |= {outer: None} if not any(p.startswith(f"{outer}.") for p in found) else {}
    if found.get("algo.dynamic_sampling") is True:
        del found["algo.dynamic_sampling"]
    assert not (algo.get("dynamic_sampling") is False and "algo.dynamic_sampling.max_batches" in found)
    return found


@pytest.mark.parametrize("name", BEFORE)
def test_a_preset_has_the_values_of_before(name: str) -> None:
    config = make_config(name)
    now = leaves(config.algo, "algo")
    if isinstance(config, Config) and config.critic is not None:
        now |= leaves(config.critic, "critic")
    if "algo.loss.epsilon_high" in now:
        now["algo.loss.epsilon_high"] = config.algo.loss.high  # pyright: ignore[reportAttributeAccessIssue]
    expected = translated(BEFORE[name])
    if name == "online_kto":
        expected["algo.name"] = name
    offline = BEFORE[name].get("preference", {}).get("source") == "dataset"
    assert offline == (type(config) is RunConfig)
    if offline:  # nothing is drawn
        assert expected.pop("algo.dynamic_sampling") is None
    if "algo.value.lam" in expected:
        assert now.pop("algo.value.lam") is None
        assert config.algo.lam == expected.pop("algo.value.lam")  # pyright: ignore[reportAttributeAccessIssue]
    for path in [p for p, v in expected.items() if v is None and p not in now]:
        assert not any(p.startswith(f"{path}.") for p in now), f"{path} was off"
        del expected[path]
    assert expected.keys() <= now.keys(), "options that have no place any more"
    assert {path: now[path] for path in expected} == expected
    added = {path: v for path, v in now.items() if path not in expected and v is not None}
    weights = {path: v for path, v in added.items() if path == "algo.loss.weight"}
    assert all(v == 1.0 for v in weights.values())
    rest = {path: v for path, v in added.items() if path not in weights}
    assert rest == {path: UNREAD.get(path, "not in the table") for path in rest}


def test_the_table_has_every_preset_and_every_option_of_before() -> None:
    assert set(BEFORE) == set(PRESETS)
    implied = {"algo": {"multi_objective_aggregation"}, "preference": {"source"}}
    for sections in BEFORE.values():
        for section, options in sections.items():
            assert set(options) <= set(PATHS[section]) | implied.get(section, set())


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_sound_and_completing_it_twice_changes_nothing(name: str) -> None:
    assert PRESETS[name].name == name
    config = make_config(name)
    check(config)
    assert complete(config) == config
    assert preset(**dataclasses.asdict(config.algo)) == config.algo


def test_presets_of_all_families() -> None:
    assert set(REQUIRED) <= set(policy_gradient.PRESETS) <= set(PRESETS)
    assert len(PRESETS) == len(BEFORE) == 36


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "grpo",
            {"baseline.scale": "group", "aggregation": "grpo", "loss.epsilon": 0.2, "loss.high": 0.2, "beta": 0.0},
        ),
        ("dr_grpo", {"baseline.scale": "none", "aggregation": "dr_grpo"}),
        (
            "dapo",
            {
                "loss.epsilon": 0.2,
                "loss.epsilon_high": 0.28,
                "aggregation": "dapo",
                "dynamic_sampling.max_batches": 10,
                "loss.dual_clip": 10.0,
            },
        ),
        (
            "lite_ppo",
            {
                "baseline.kind": "group",
                "baseline.scale": "batch",
                "baseline.batch_std_of": "raw",
                "aggregation": "dapo",
            },
        ),
        ("gspo", {"loss.ratio": "sequence", "loss.epsilon": 3e-4, "loss.epsilon_high": 4e-4, "aggregation": "grpo"}),
        ("cispo", {"loss.kind": "cispo", "loss.max_ratio": 5.0, "aggregation": "dapo"}),
        ("sapo", {"loss.temperature_pos": 1.0, "loss.temperature_neg": 1.05, "aggregation": "grpo"}),
        ("rloo", {"baseline.kind": "leave_one_out", "kl.kind": "reward"}),
        ("reinforce_pp", {"baseline.kind": "none", "whiten": True, "kl.kind": "reward", "aggregation": "dapo"}),
        (
            "reinforce_pp_baseline",
            {"baseline.kind": "group", "baseline.scale": "none", "kl.kind": "loss", "kl.estimator": "k2"},
        ),
        (
            "thr",
            {
                "token_weighting.kind": "thr",
                "token_weighting.p": 0.1,
                "token_weighting.threshold": "nthr_min",
                "aggregation": "grpo",
            },
        ),
        ("c_grpo", {"rubric.alpha": 0.3, "rubric.norm": "group_max"}),
    ],
)
def test_rows(name: str, expected: dict[str, Any]) -> None:
    found = {}
    for path in expected:
        value: Any = preset(name)
        for part in path.split("."):
            value = getattr(value, part)
        found[path] = value
    assert found == expected


def test_options_without_a_reader_do_not_exist() -> None:
    assert not hasattr(preset("cispo").loss, "epsilon")  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(preset("rloo").baseline, "scale")  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(preset("rloo").kl, "estimator"), "k1 alone is sound in the reward"  # pyright: ignore


def test_what_is_given_wins() -> None:
    def policy_gradients(name: str, **over: Any) -> Any:
        found = preset(name, **over)
        assert isinstance(found, PolicyGradient)
        return found

    found = policy_gradients("dapo", loss={"epsilon_high": 0.4}, dynamic_sampling=None, kl={"beta": 0.01})
    assert (found.loss.high, found.dynamic_sampling, found.beta, found.kl.estimator) == (0.4, None, 0.01, "k3")
    assert policy_gradients("grpo", loss={"epsilon": 0.3}).loss.high == 0.3
    assert policy_gradients("grpo", loss={"epsilon": 0.3, "epsilon_high": 0.0}).loss.high == 0.0
    assert policy_gradients("dapo", loss={"epsilon": 0.3}).loss.high == 0.28


# --- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ({"loss": {"max_ratio": 3.0}}, "algo.loss.max_ratio: not read by what was chosen, but by kind cispo"),
        ({"name": "cispo", "loss": {"epsilon_high": 5.0}}, "algo.loss.epsilon_high: not read by what was chosen"),
        ({"kl_estimator": "k2"}, "algo.kl_estimator: now algo.kl.estimator"),
        ({"token_weighting": {"kind": "nthr", "p": 0.1}}, "algo.token_weighting.p: not read by what was chosen"),
        ({"name": "nthr", "token_weighting": {"p": 0.1}}, "not read by what was chosen, but by kind thr"),
        ({"baseline": {"batch_std_of": "centred"}}, "only read with algo.baseline.scale batch"),
        ({"name": "rloo", "baseline": {"scale": "group"}}, "but by kind group, kind batch, kind none"),
        ({"name": "vespo", "loss": {"ratio": "sequence"}}, "but by kind clip, kind cispo, kind sapo"),
        ({"sampler": {"kind": "bypass", "low": 0.5}}, "algo.sampler.low: not read by what was chosen, but by kind we"),
        ({"sampler": {"kind": "none", "high": 3.0}}, "algo.sampler.high: not read by what was chosen, but by kind we"),
        ({"sampler": {"outside": "mask", "high": 1.0}}, "1, where sampler"),
        ({"name": "vespo", "sampler": {"of": "sequence", "outside": "mask"}}, "set algo.sampler.of token"),
        ({"name": "gspo", "token_weighting": "thr"}, "set algo.loss.ratio sequence_token"),
        ({"name": "gmpo", "token_weighting": "thr"}, "algo.loss gmpo takes one advantage per sequence"),
        ({"name": "optimal_token", "loss": {"ratio": "sequence"}}, "algo.baseline optimal_token gives every token"),
        ({"name": "gmpo", "top_entropy_quantile": 0.2}, "the mean over a whole sequence"),
        ({"kl": {"estimator": "k1"}}, "algo.kl.estimator is 'k1': must be one of k2, k3, abs, full"),
        (
            {"kl": {"kind": "reward", "estimator": "k3"}},
            "algo.kl.estimator: not read by what was chosen, but by kind l",
        ),
        ({"kl": {"kind": "reward", "estimator": "full"}}, "algo.kl.estimator: not read by what was chosen"),
        ({"kl": {"estimator": "full", "bias_correction": True}}, "set algo.kl.bias_correction false"),
        ({"kl": {"horizon": 5}}, "algo.kl.horizon 5 is only read with algo.kl.target"),
        ({"name": "reinforce_pp", "dynamic_sampling": {}}, "those do carry a gradient"),
        ({"name": "gdpo", "rubric": {}}, "choose one"),
        ({"name": "passk", "overlong_buffer": 0.2}, "right and wrong only"),
        ({"name": "passk", "baseline": {"k": 9}}, "exceeds rollout.num_generations 8"),
        ({"num_mini_batches": 17}, "exceeds rollout.num_prompts 16"),
        ({"loss": {"epsilon": -0.1}}, "algo.loss.epsilon is -0.1: must be at least 0"),
        ({"num_iterations": 0}, "algo.num_iterations is 0: must be at least 1"),
        ({"loss": {"delta": 1.1}}, "must be above 1 + epsilon_high"),
        ({"loss": {"dual_clip": 0.5}}, "algo.loss.dual_clip is 0.5: must be above 1"),
        ({"top_entropy_quantile": 0.0}, "algo.top_entropy_quantile is 0.0: must be above 0"),
        ({"name": "thr", "token_weighting": {"p": 2.0}}, "algo.token_weighting.p is 2.0: must be at most 1"),
        ({"name": "thr", "token_weighting": {"threshold": "quantile"}}, "a quantile must be at least 0 and below 1"),
        ({"name": "thr", "token_weighting": {"p_steps": 7}}, "p_steps is only read with algo.token_weighting.p_end"),
        (
            {"name": "thr", "token_weighting": {"threshold": "none", "threshold_value": 2.0}},
            "threshold_value is not read with threshold none",
        ),
        ({"name": "optimal_token", "kl": "reward"}, "a KL penalty goes into the loss"),
        ({"name": "gdpo", "kl": "reward"}, "standardizes every reward apart: set algo.kl.kind loss"),
        ({"name": "passk", "kl": "reward"}, "algo.kl.kind reward shapes the reward, but the pass@k advantage"),
        ({"name": "passk", "rubric": {}}, "algo.rubric shapes the reward, but the pass@k advantage"),
        ({"name": "passk", "baseline": {"k": 8}}, "k 8 equals rollout.num_generations 8, so every pass@k advantage"),
    ],
)
def test_contradictions_are_reported_at_parse_time(algo: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="configuration:") as caught:
        check(make_config(**algo))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_contradictions_with_the_rest_of_the_configuration() -> None:
    assert "at least 2 rollouts" in findings(make_config(size=1))[0]
    assert findings(make_config("reinforce_pp", size=1)) == []
    assert findings(make_config("remax", size=1)) == []
    assert "at least two rewards" in findings(make_config("gdpo", rewards=1))[0]
    passk = make_config("passk")
    assert isinstance(passk, Config) and findings(passk) == []
    gated = [dataclasses.replace(passk.rewards[0], gate="other"), RewardConfig(fn="other", weight=0.0)]
    assert "whatever its gate or scale" in findings(dataclasses.replace(passk, rewards=gated))[0]
    config = make_config("c_grpo")
    assert isinstance(config, Config)
    config = dataclasses.replace(config, rewards=[RewardConfig(fn="rewards/citation_rubric.py:score_group")])
    assert "and so does the reward `score_group`" in findings(config)[0]


def test_all_findings_come_at_once_from_the_command_line() -> None:
    argv = ["--model.path=m", "--data.path=d", "--algo.name=gspo", "--algo.token_weighting=thr"]
    with pytest.raises(UserError) as caught:
        load_config([*argv, "--rollout.top_k=5"])
    for part in ("rewards is empty", "top_k 5 cut", "sequence_token"):
        assert part in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_config([*argv, "--algo.loss.max_ratio=2", "--train.max_stepps=3", "--model.dtype=int8"])
    for part in ("algo.loss.max_ratio", "train.max_stepps", "model.dtype"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"algo\.name 'grop': there is no such preset; did you mean grpo"):
        load_config([*argv[:2], "--algo.name=grop"])


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_cautions() -> None:
    def cautions(name: str = "grpo", **algo: Any) -> str:
        return " ".join(preset(name, **algo).cautions())

    assert cautions() == ""
    assert "weighs a per-sequence loss by length" in cautions("gspo", aggregation="dapo")
    assert "overlong_buffer punishes most" in cautions("dapo", mask_truncated_completions=True)
    assert "deviation is larger" in cautions("lite_ppo", dynamic_sampling={})
    assert "biased once the batch is off-policy" in cautions(kl={"beta": 0.1}, num_iterations=2)
    assert cautions(kl={"beta": 0.1, "bias_correction": True}, num_iterations=2) == ""
    assert "has no effect" in cautions("kl_cov", num_mini_batches=1)


def test_a_preset_says_what_it_sets_and_what_was_changed() -> None:
    assert "learns from" in describe(make_config("passk"))[1] and len(describe(make_config("passk", rewards=1))) == 1
    (line,) = describe(make_config("dapo"))
    for part in ("algorithm dapo:", "loss.epsilon_high 0.28", "dynamic_sampling.max_batches 10", "aggregation dapo"):
        assert part in line
    assert "changed" not in line
    line, caution = describe(make_config("gspo", kl={"beta": 0.02}, num_mini_batches=2))
    assert caution.startswith("caution: the k3 penalty is biased")
    changed = line.split("; changed: ")[1]
    assert "kl.beta 0.02" in changed and "num_mini_batches 2" in changed and "epsilon" not in changed


def test_a_completed_configuration_survives_its_file(tmp_path: Any) -> None:
    config = make_config("thr", token_weighting={"p": -0.1})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_no_torch_is_needed_to_check_a_configuration() -> None:
    code = "import sys, llmrl.config, llmrl.config.help, llmrl.config.describe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_preset_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "algorithms" / "README.md").read_text()
    assert [name for name in policy_gradient.PRESETS if f"| `{name}` |" not in text] == []
