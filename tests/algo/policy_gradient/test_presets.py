"""Presets: each is complete and stable, what is given wins, and every contradiction is told before anything loads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from llmrl.algo.presets import (
    GRPO,
    PRESETS,
    READ_WITH,
    SAMPLER_BOUNDS,
    cautions,
    contradictions,
    describe,
    resolve,
)

from llmrl.config import AlgoConfig, Config, Preset, RewardConfig, RolloutConfig, load_config, save_config, validate
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


def make_config(*, size: int = 8, rewards: int = 2, **algo: Any) -> Config:
    config = Config(algo=AlgoConfig(**algo), rollout=RolloutConfig(num_generations=size))
    config.model.path, config.data.path = "m", "d"
    config.rewards = [RewardConfig(fn=f"rewards/r.py:r{i}") for i in range(rewards)]
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_sound_and_resolving_it_twice_changes_nothing(name: str) -> None:
    validate(make_config(name=name))
    resolved = resolve(AlgoConfig(name=name))  # pyright: ignore
    assert resolve(resolved) == resolved
    validate(make_config(**dataclasses.asdict(resolved)))
    for option, value in PRESETS[name].items():
        assert getattr(resolved, option) == value, f"{option} is set by the row, but nothing reads it"


def test_the_rows_and_the_names_are_the_same() -> None:
    assert list(get_args(Preset)) == list(PRESETS)
    assert set(REQUIRED) <= set(PRESETS)
    options = {f.name for f in dataclasses.fields(AlgoConfig)} - {"name"}
    rows = {option for row in (GRPO, *PRESETS.values()) for option in row}
    by_mode = {option for row in SAMPLER_BOUNDS.values() for option in row}
    off_when_unset = {"delta", "dual_clip", "off_policy_mask_threshold", "kl_target", "thr_p_end", "nthr_eta"}
    assert rows | off_when_unset | by_mode | {"epsilon_high"} == options
    assert set(READ_WITH) <= options
    for name, value in GRPO.items():
        literal = get_args(get_args(get_type_hints(AlgoConfig)[name])[0])
        assert not literal or value in literal


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", {"scale_rewards": "group", "loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0}),
        ("dr_grpo", {"scale_rewards": "none", "loss_type": "dr_grpo"}),
        (
            "dapo",
            {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "dynamic_sampling": True, "dual_clip": 10.0},
        ),
        ("lite_ppo", {"baseline": "group", "scale_rewards": "batch", "batch_std_of": "raw", "loss_type": "dapo"}),
        ("gspo", {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "loss_type": "grpo"}),
        ("cispo", {"policy_loss": "cispo", "max_ratio": 5.0, "loss_type": "dapo", "epsilon": None}),
        ("sapo", {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "loss_type": "grpo"}),
        ("rloo", {"baseline": "leave_one_out", "kl_in": "reward", "kl_estimator": "k1", "scale_rewards": None}),
        ("reinforce_pp", {"baseline": "none", "whiten_advantages": True, "kl_in": "reward", "loss_type": "dapo"}),
        (
            "reinforce_pp_baseline",
            {"baseline": "group", "scale_rewards": "none", "kl_in": "loss", "kl_estimator": "k2"},
        ),
        ("thr", {"token_weighting": "thr", "thr_p": 0.1, "thr_threshold": "nthr_min", "loss_type": "grpo"}),
        ("c_grpo", {"rubric_alpha": 0.3, "rubric_norm": "group_max"}),
    ],
)
def test_rows(name: str, expected: dict[str, Any]) -> None:
    resolved = resolve(AlgoConfig(name=name))  # pyright: ignore
    assert {option: getattr(resolved, option) for option in expected} == expected


def test_what_is_given_wins() -> None:
    resolved = resolve(AlgoConfig(name="dapo", epsilon_high=0.4, dynamic_sampling=False, beta=0.01))
    assert (resolved.epsilon_high, resolved.dynamic_sampling, resolved.beta, resolved.kl_estimator) == (
        0.4,
        False,
        0.01,
        "k3",
    )
    assert resolve(AlgoConfig(epsilon=0.3)).epsilon_high == 0.3
    assert resolve(AlgoConfig(epsilon=0.3, epsilon_high=0.0)).epsilon_high == 0.0
    assert resolve(AlgoConfig(name="dapo", epsilon=0.3)).epsilon_high == 0.28


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ({"max_ratio": 3.0}, "algo.max_ratio 3.0 is given, but only read with policy_loss cispo"),
        ({"name": "cispo", "epsilon_high": 5.0}, "algo.epsilon_high 5.0 is given"),
        ({"kl_estimator": "k2"}, "only read with beta above 0"),
        ({"thr_p": 0.1}, "only read with token_weighting thr"),
        ({"name": "nthr", "thr_p": 0.1}, "only read with token_weighting thr"),
        ({"batch_std_of": "centred"}, "only read with scale_rewards batch"),
        ({"name": "rloo", "scale_rewards": "group"}, "only read with baseline group, batch or none"),
        ({"name": "vespo", "importance_sampling_level": "sequence"}, "only read with policy_loss clip, cispo or sapo"),
        ({"dynamic_sampling_max_batches": 3}, "only read with dynamic_sampling"),
        ({"vllm_importance_sampling_clip_max": 3.0}, "only read with a vllm_importance_sampling_mode of weights"),
        (
            {"vllm_importance_sampling_mode": "bypass", "vllm_importance_sampling_clip_min": 0.5},
            "only read with a vllm_importance_sampling_mode of weights",
        ),
        ({"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.0}, "1, where sampler"),
        ({"name": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "use algo.vllm_importance_sampling_mode"),
        ({"name": "gspo", "token_weighting": "thr"}, "set algo.importance_sampling_level sequence_token"),
        ({"name": "gmpo", "token_weighting": "thr"}, "policy_loss gmpo takes one per sequence"),
        (
            {"name": "optimal_token", "importance_sampling_level": "sequence"},
            "baseline optimal_token gives every token",
        ),
        ({"name": "gmpo", "top_entropy_quantile": 0.2}, "the mean over a whole sequence"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "gradient of zero on average"),
        ({"beta": 0.1, "kl_in": "reward"}, "only k1 is sound there"),
        ({"beta": 0.1, "kl_in": "reward", "kl_estimator": "full"}, "says nothing about the token drawn"),
        (
            {"beta": 0.1, "kl_estimator": "full", "use_bias_correction_kl": True},
            "only read with beta above 0, kl_in loss",
        ),
        ({"name": "reinforce_pp", "dynamic_sampling": True}, "those do carry a gradient"),
        ({"name": "gdpo", "rubric_alpha": 0.3}, "choose one"),
        ({"name": "passk", "overlong_buffer": 0.2}, "right and wrong only"),
        ({"name": "passk", "passk_k": 9}, "exceeds rollout.num_generations 8"),
        ({"num_mini_batches": 17}, "exceeds rollout.num_prompts 16"),
        ({"epsilon": -0.1}, "algo.epsilon is -0.1: must not be negative"),
        ({"num_iterations": 0}, "algo.num_iterations is 0: must be at least 1"),
        ({"delta": 1.1}, "must be above 1 + epsilon_high"),
        ({"dual_clip": 0.5}, "must be above 1"),
        ({"top_entropy_quantile": 0.0}, "must lie above 0"),
        ({"name": "thr", "thr_p": 2.0}, "must lie between -1 and 1"),
        ({"name": "thr", "thr_threshold": "quantile"}, "a quantile must be at least 0 and below 1"),
    ],
)
def test_contradictions_are_told_at_parse_time(algo: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="configuration:") as caught:
        validate(make_config(**algo))
    assert message in str(caught.value)


def test_contradictions_with_the_rest_of_the_configuration() -> None:
    assert "at least 2 rollouts" in contradictions(make_config(size=1))[0]
    assert contradictions(make_config(size=1, name="reinforce_pp")) == []
    assert contradictions(make_config(size=1, name="remax")) == []
    assert "at least two rewards" in contradictions(make_config(name="gdpo", rewards=1))[0]
    config = make_config(name="c_grpo")
    config.rewards[0].fn = "rewards/citation_rubric.py:score_group"
    assert "and so does the reward `score_group`" in contradictions(config)[0]


def test_all_findings_come_at_once_from_the_command_line() -> None:
    argv = ["--model.path=m", "--data.path=d", "--algo.name=gspo", "--algo.token_weighting=thr", "--algo.max_ratio=2"]
    with pytest.raises(UserError) as caught:
        load_config(argv)
    for part in ("rewards is empty", "algo.max_ratio 2.0 is given", "sequence_token"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="algo.name"):
        load_config([*argv[:2], "--algo.name=grop"])


def test_cautions() -> None:
    def told(**algo: Any) -> str:
        return " ".join(cautions(resolve(AlgoConfig(**algo))))

    assert told() == ""
    assert "weighs a per-sequence loss by length" in told(name="gspo", loss_type="dapo")
    assert "overlong_buffer punishes most" in told(name="dapo", mask_truncated_completions=True)
    assert "deviation is larger" in told(name="lite_ppo", dynamic_sampling=True)
    assert "biased once the batch is off-policy" in told(beta=0.1, num_iterations=2)
    assert told(beta=0.1, num_iterations=2, use_bias_correction_kl=True) == ""
    assert "has no effect" in told(name="kl_cov", num_mini_batches=1)


def test_a_preset_says_what_it_sets_and_what_was_changed() -> None:
    (line,) = describe(AlgoConfig(name="dapo"))
    for part in ("algorithm dapo:", "epsilon_high 0.28", "dynamic_sampling True", "loss_type dapo"):
        assert part in line
    assert "changed" not in line
    line, caution = describe(AlgoConfig(name="gspo", beta=0.02, num_mini_batches=2))
    assert caution.startswith("caution: the k3 penalty is biased")
    changed = line.split("; changed: ")[1]
    assert "beta 0.02" in changed and "num_mini_batches 2" in changed and "epsilon" not in changed


def test_a_resolved_configuration_survives_its_file(tmp_path: Any) -> None:
    config = make_config(name="thr", thr_p=-0.1)
    config.algo = resolve(config.algo)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]).algo == config.algo


def test_no_torch_is_needed_to_check_a_configuration() -> None:
    code = "import sys, llmrl.config, llmrl.algo.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_preset_is_documented() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "algorithms" / "README.md").read_text()
    assert [name for name in PRESETS if f"| `{name}` |" not in text] == []
