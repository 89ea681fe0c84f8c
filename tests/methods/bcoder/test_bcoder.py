"""B-Coder through the trainer: its streams by hand, its two stages, what stays frozen, and ranking."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmrl import Trainer
from llmrl.cli import run
from llmrl.config import (
    Config,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    check,
    findings,
    from_dotted,
    preset,
)
from llmrl.data.chat import Chat
from llmrl.data.tasks import tasks_from_rows
from llmrl.engines.base import FakeEngine
from llmrl.errors import UserError
from llmrl.methods.bcoder import bellman
from llmrl.methods.bcoder.algorithm import REAL, REWARDS, BCoder
from llmrl.methods.bcoder.options import BCoderOptions, PolicyStage, ValueStage
from llmrl.methods.bcoder.policy import ANCHORS, BASE_VALUES, QPolicy
from llmrl.methods.bcoder.rerank import Ranker
from llmrl.methods.bcoder.source import StoredPrograms
from llmrl.rollout.collector import Collector
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.track.files import read_jsonl
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts, Sample
from llmrl.verify.rubric import Rubric

OUTCOMES = [1.0, -0.3, -0.6, -1.0]


def rows(number: int = 8) -> list[dict[str, Any]]:
    texts = ["return x", "return y", "retrun", "("]
    return [
        {
            "prompt": f"task {i}",
            "solution": f"return {i}",
            "samples": [{"completion": text, "reward": r} for text, r in zip(texts, OUTCOMES, strict=True)],
        }
        for i in range(number)
    ]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "algo.name": "bcoder",
        "train.output_dir": str(folder),
        "train.max_steps": 3,
        "train.learning_rate": 1e-2,
        "train.save_steps": 0,
        "data.prompt_format": "text",
        "rollout.num_prompts": 4,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 16,
        "track.console": "quiet",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def trained(folder: Path, model: str, **more: Any) -> Path:
    run = Trainer(settings(folder, **more), model=model, reward=lambda completion: 0.0, train_dataset=rows())
    metrics = run.train()
    assert np.isfinite(metrics["loss/total"])
    assert "kl/mismatch" not in metrics, "nobody sampled these tokens"
    return folder / "model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    build_tiny_model(
        "qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stages(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model/ folders of both stages."""
    folder = tmp_path_factory.mktemp("stages")
    first = trained(folder / "value", base)
    return first, trained(folder / "policy", str(first), algo__stage="policy")


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- stored programs --------------------------------------------------------------------------------------------------


def source(*, size: int = 4, real_frac: float = 0.5) -> StoredPrograms:
    chat = Chat(byte_tokenizer(), prompt_format="text")
    rollout = RolloutConfig(num_generations=size, max_completion_length=16)
    engine = FakeEngine(lambda prompt, sampling: [65, sampling.stop_token_ids[0]])
    live = Collector(engine, chat, Rubric([lambda completion: 0.0]), rollout, seed=0)
    return StoredPrograms(chat, BCoderOptions(real_frac=real_frac), num_generations=size, seed=0, live=live)


def test_groups_of_stored_programs() -> None:
    found = source()
    tasks = tasks_from_rows(rows(), DataConfig(), "t")
    [group] = asyncio.run(found.collect(tasks[:1], [0]))
    assert [r.score.info["real"] for r in group.rollouts] == [True, True, False, False]  # type: ignore[union-attr]
    assert [r.completion for r in group.rollouts[:2]] == ["return 0"] * 2
    drawn = [r.score.reward for r in group.rollouts[2:]]  # type: ignore[union-attr]
    assert len(set(drawn)) == 2, "drawn without replacement"
    assert all(r.turns[0].completion_ids[-1] == found.chat.stop_token_ids[0] for r in group.rollouts)
    assert asyncio.run(found.collect(tasks[:1], [0])) == [group]
    drawn_later = {tuple(r.completion for r in found.group(tasks[0], p).rollouts[2:]) for p in range(20)}
    assert len(drawn_later) > 3, "other positions of the run draw other programs"


def test_evaluation_still_samples() -> None:
    [group] = asyncio.run(source().collect(tasks_from_rows(rows(), DataConfig(), "t")[:1], [0], salt="eval"))
    assert group.rollouts[0].completion == "A"


def test_a_run_without_held_out_tasks_cannot_sample() -> None:
    stored = StoredPrograms(Chat(byte_tokenizer(), prompt_format="text"), BCoderOptions(), num_generations=2, seed=0)
    with pytest.raises(UserError, match="nothing can be sampled.*set eval.data"):
        asyncio.run(stored.collect(tasks_from_rows(rows(), DataConfig(), "t")[:1], [0], salt="eval"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("samples"), "no column `samples`"),
        (lambda row: row["samples"][0].pop("reward"), "needs `completion` and `reward`"),
        (lambda row: row["samples"][0].update(reward=2.0), "outcome: bcoder"),
    ],
)
def test_unusable_rows_are_refused_before_a_model_is_loaded(
    change: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrl.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    bad = rows()
    change(bad[5])
    with pytest.raises(UserError, match=said):
        Trainer(settings(tmp_path / "run"), model="tiny:qwen2", reward=lambda completion: 0.0, train_dataset=bad)


def test_a_row_without_its_right_program_is_named(base: str, tmp_path: Path) -> None:
    bad = [{k: v for k, v in row.items() if k != "solution"} | {"answer": "x"} for row in rows()]
    with pytest.raises(UserError, match="no right program in column 'solution'"):
        Trainer(settings(tmp_path / "run"), model=base, reward=lambda completion: 0.0, train_dataset=bad).train()


# --- streams and loss -------------------------------------------------------------------------------------------------


def test_streams_and_loss_by_hand() -> None:
    """One right and one sampled program; the loss of both stages from numbers that are given."""
    stage = PolicyStage(q_coef=1.0, adv_coef=0.1, ce_coef=0.5)
    algorithm = BCoder(BCoderOptions(stage=stage, gamma=0.5), max_completion_length=16)
    found = source(size=2)
    groups = asyncio.run(found.collect(tasks_from_rows(rows(), DataConfig(), "t")[:1], [0]))
    batch = algorithm.prepare(groups, policy_version=0)
    right, sampled = batch.samples
    assert right.extras[REAL].all() and not sampled.extras[REAL].any()
    assert right.extras[REWARDS].tolist() == [0.0] * (right.num_tokens - 1) + [1.0]
    assert not batch.sampled

    def short(sample: Sample) -> Sample:
        """Its last two tokens."""
        mask = sample.loss_mask.copy()
        mask[np.flatnonzero(mask)[:-2]] = False
        streams = {name: values[-2:] for name, values in sample.extras.items()}
        zeros = np.zeros(2, np.float32)
        return Sample(
            input_ids=sample.input_ids, loss_mask=mask, advantages=zeros, rollout_logprobs=zeros, group=0, index=0,
            extras=streams,
        )  # fmt: skip

    micro = build_micro_batch([short(right), short(sampled)], [[0], [1]])
    from llmrl.types import ForwardOutputs

    outputs = ForwardOutputs(
        logprobs=torch.tensor([-1.0, -2.0, -9.0, -9.0]),
        entropy=torch.zeros(4),
        values=torch.tensor([0.4, 0.2, 0.1, 0.3]),
        extras={
            "advantages": torch.tensor([-0.1, -0.2, 0.0, -0.5]),
            "anchor_advantages": torch.tensor([0.0, -0.3, 0.0, -0.4]),
        },
    )
    reward = micro.extras[REWARDS][-1].item()
    # targets: .5 * (.2 - .3), 1;  .5 * (.3 - .4), reward.  Q: .3, 0;  .1, -.2
    errors = [(-0.05 - 0.3) ** 2, (1 - 0.0) ** 2, (-0.05 - 0.1) ** 2, (reward + 0.2) ** 2]
    q_loss = (sum(errors[:2]) / 2 + sum(errors[2:]) / 2) / 2
    counts = Counts(num_tokens=4, num_sequences=2, num_groups=1, max_completion_length=16)
    total, metrics = algorithm.loss(outputs, micro, counts)
    assert metrics["loss/q"].item() == pytest.approx(q_loss, rel=1e-5)
    assert metrics["loss/adv"].item() == pytest.approx(0.3)
    assert metrics["loss/ce"].item() == pytest.approx(3.0)
    assert total.item() == pytest.approx(q_loss + 0.1 * 0.3 + 0.5 * 3.0, rel=1e-5)
    value_stage = BCoder(BCoderOptions(gamma=0.5), max_completion_length=16)
    assert value_stage.loss(outputs, micro, counts)[0].item() == pytest.approx(q_loss, rel=1e-5)


def policy_of(model: Any, stage: str = "value", base: str = "nowhere") -> QPolicy:
    options = BCoderOptions(stage=PolicyStage() if stage == "policy" else ValueStage())
    return QPolicy(model, options, base_model=base, chat={})


def test_advantages_and_anchors_are_those_of_all_logits(seed: int) -> None:
    model = build_tiny_model("llama", vocab_size=40, seed=seed)
    policy, ids = policy_of(model), torch.randint(0, 40, (9,), generator=torch.Generator().manual_seed(seed))
    sample = Sample(
        input_ids=ids.numpy(), loss_mask=np.arange(9) >= 4, advantages=np.zeros(5, np.float32),
        rollout_logprobs=np.zeros(5, np.float32), group=0, index=0,
    )  # fmt: skip
    batch = build_micro_batch([sample], [[0]])
    batch.extras = policy.streams(batch)
    outputs = policy.forward(batch)
    logits = model(ids[None]).logits[0, 3:8]
    assert batch.extras[ANCHORS].long().equal(logits.argmax(-1))
    assert torch.allclose(outputs.extras["advantages"], bellman.advantage(logits, ids[4:]), atol=1e-5)
    assert outputs.extras["anchor_advantages"].abs().max() == 0, "before training the anchor is the greedy token"
    assert outputs.values is not None
    assert torch.allclose(outputs.values, torch.zeros(5), atol=1e-5), "V begins at 0"


def test_the_advantage_differentiates_through_the_maximum(seed: int, stages: tuple[Path, Path]) -> None:
    """Against autograd through l(a) - max l on the plain logits, for every parameter."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stages[0])
    policy = policy_of(model, "policy", str(stages[0]))
    ids = torch.randint(0, 250, (7,), generator=torch.Generator().manual_seed(seed))
    sample = Sample(
        input_ids=ids.numpy(), loss_mask=np.arange(7) >= 3, advantages=np.zeros(4, np.float32),
        rollout_logprobs=np.zeros(4, np.float32), group=0, index=0,
    )  # fmt: skip
    batch = build_micro_batch([sample], [[0]])
    batch.extras = policy.streams(batch)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (policy.forward(batch).extras["advantages"] * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (bellman.advantage(model(ids[None]).logits[0, 2:6], ids[3:]) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-5, atol=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_the_value_stage_moves_the_value_head_alone(base: str, stages: tuple[Path, Path]) -> None:
    first, _ = stages
    before, after = parameters(Path(base)), parameters(first)
    assert all(after[name].equal(before[name]) for name in before)
    heads = load_file(first / "bcoder" / "heads.safetensors")
    assert heads["value_head.outer.weight"].abs().max() > 0
    assert heads["residual_head.outer.weight"].equal(heads["residual_anchor.outer.weight"])


def test_the_policy_stage_moves_logits_and_residual_and_leaves_v_phi(stages: tuple[Path, Path]) -> None:
    first, second = stages
    assert not parameters(first)["model.embed_tokens.weight"].equal(parameters(second)["model.embed_tokens.weight"])
    before, after = (load_file(folder / "bcoder" / "heads.safetensors") for folder in stages)
    for name in before:
        assert after[name].equal(before[name]) == (not name.startswith("residual_head")), name


def test_anchors_and_base_values_stay_those_of_the_first_stage(stages: tuple[Path, Path]) -> None:
    from llmrl.methods.bcoder.policy import load_q

    first, second = (load_q(folder, device="cpu")[0] for folder in stages)
    sample = Sample(
        input_ids=np.arange(40, 50), loss_mask=np.arange(10) >= 4, advantages=np.zeros(6, np.float32),
        rollout_logprobs=np.zeros(6, np.float32), group=0, index=0,
    )  # fmt: skip
    batch = build_micro_batch([sample], [[0]])
    expected, found = first.streams(batch), second.streams(batch)
    assert found[ANCHORS].equal(expected[ANCHORS])
    assert found[BASE_VALUES].equal(expected[BASE_VALUES])


@pytest.mark.slow
def test_adapters_leave_the_base_as_the_anchor(stages: tuple[Path, Path], tmp_path: Path) -> None:
    second = trained(tmp_path / "lora", str(stages[0]), algo__stage="policy", model__lora={"r": 4})
    scores = Ranker.load(second).scores([{"role": "user", "content": "task 1"}], ["return 1", "("])
    assert len(set(scores)) == 2


@pytest.mark.slow
def test_a_resumed_stage_equals_an_undisturbed_one(stages: tuple[Path, Path], tmp_path: Path) -> None:
    more = {"algo__stage": "policy", "train__lr_scheduler_type": "constant"}
    whole = trained(tmp_path / "whole", str(stages[0]), train__max_steps=4, **more)
    trained(tmp_path / "parts", str(stages[0]), train__max_steps=2, **more)
    resumed = {"train__resume_from_checkpoint": "last", "train__max_steps": 4}
    parts = trained(tmp_path / "parts", str(stages[0]), **more, **resumed)
    for file in ("model.safetensors", "bcoder/heads.safetensors"):
        expected, found = load_file(whole / file), load_file(parts / file)
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
def test_q_learns_which_programs_pass(base: str, tmp_path: Path) -> None:
    """With outcomes alone (no right programs given) the recovered reward orders the outcome classes."""
    more = {"algo.real_frac": 0, "rollout.num_generations": 4, "rollout.num_prompts": 8}
    first = trained(tmp_path / "value", base, **more, train__max_steps=60)
    second = trained(tmp_path / "policy", str(first), **more, algo__stage="policy", train__max_steps=60,
                     train__learning_rate=3e-3)  # fmt: skip
    programs = [sample["completion"] for sample in rows()[0]["samples"]]
    task: list[Any] = [{"role": "user", "content": "task 3"}]
    exact = Ranker.load(second, exact=True)
    assert exact.rank(task, programs) == [0, 1, 2, 3]
    assert exact.scores(task, programs) == pytest.approx(OUTCOMES, abs=0.6), "what it recovers are the rewards"
    before = Ranker.load(first, exact=True).scores(task, programs)
    assert before != pytest.approx(OUTCOMES, abs=0.6)


def test_ranking_by_the_command(stages: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": "x"}) + "\n" for i in range(4)))
    argv = ["eval", "--model", "tiny:qwen2", "--data", str(file), "--reward", f"{__file__}:digits", "--samples", "4"]
    argv += ["--rollout.max_completion_length", "6", "--output", str(tmp_path / "out.json"), "--rerank", "bcoder"]
    assert run([*argv, "--rerank_model", str(stages[1])]) == 0
    ranked = json.loads((tmp_path / "out.json").read_text())["rerank"]
    assert ranked["random"] <= ranked["oracle"] and 0 <= ranked["ranked"] <= ranked["oracle"]
    assert run([*argv, "--rerank_model", str(tmp_path)]) == 2


def digits(completion: str) -> float:
    return float(any(character.isdigit() for character in completion))


# --- what it refuses --------------------------------------------------------------------------------------------------


def configuration(**algo: Any) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(path="d"),
        rollout=RolloutConfig(num_generations=2),
        rewards=[RewardConfig(fn="rewards/length.py:length")],
        algo=preset("bcoder", **algo),
    )


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ({"stage": {"adv_coef": 0.1}}, "algo.stage.adv_coef: not read by what was chosen, but by kind policy"),
        ({"stage": {"kind": "policy", "hidden_size": 8}}, "algo.stage.hidden_size: not read .* but by kind value"),
        ({"alpha": 0.0}, "algo.alpha is 0.0: must be above 0"),
        ({"gamma": 1.5}, "algo.gamma is 1.5: must be at most 1"),
        ({"real_frac": 0.3}, "not a whole number of programs"),
        ({"stage": {"kind": "policy", "ce_coef": 0.5}, "real_frac": 0.0}, "terms of right programs"),
        ({"stage": {"kind": "policy", "q_coef": -1.0}}, "algo.stage.q_coef is -1.0: must be at least 0"),
        ({"stage": {"hidden_size": 0}}, "algo.stage.hidden_size is 0: must be at least 1"),
    ],
)
def test_options_that_contradict_each_other(algo: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(configuration(**algo))


def test_without_right_programs_their_terms_are_off() -> None:
    assert BCoderOptions(stage=PolicyStage()).coefs == (1.0, 0.1, 0.5)
    assert BCoderOptions(stage=PolicyStage(), real_frac=0.0).coefs == (1.0, 0.0, 0.0)
    assert findings(configuration(stage="policy", real_frac=0.0)) == []


def test_options_of_other_algorithms_and_bcoder_elsewhere() -> None:
    with pytest.raises(UserError, match="algo.aggregation: not read by what was chosen, but by algo.name grpo"):
        configuration(aggregation="dapo")
    with pytest.raises(UserError, match="algo.stage: not read by what was chosen, but by algo.name bcoder"):
        preset("grpo", stage="value")
    with pytest.raises(UserError, match="bcoder.stage: now algo.stage.kind"):
        from_dotted({"bcoder.stage": "value"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout.max_staleness": 1}, "rollout.max_staleness is not read by algo.name bcoder"),
        ({"rollout.temperature": 0.9}, "rollout.temperature is not read by algo.name bcoder"),
        ({"model.lora": {}}, "algo.stage value trains the value head alone"),
    ],
)
def test_options_of_other_sections_that_it_does_not_read(given: dict[str, Any], said: str) -> None:
    base = {"model.path": "m", "data.path": "d", "algo": "bcoder", "rewards": [{"fn": "r.py:r"}]}
    with pytest.raises(UserError, match=said):
        check(from_dotted(base | given))


def test_the_second_stage_wants_the_first(base: str, stages: tuple[Path, Path], tmp_path: Path) -> None:
    def start(model: str, **more: Any) -> None:
        options = settings(tmp_path / "run", algo__stage="policy", **more)
        Trainer(options, model=model, reward=lambda completion: 0.0, train_dataset=rows())

    with pytest.raises(UserError, match="no value heads there"):
        start(base)
    with pytest.raises(UserError, match="is of stage policy; algo.stage policy starts from stage value"):
        start(str(stages[1]))
    with pytest.raises(UserError, match=r"algo.gamma is 0.5, but .* was trained with 0.999"):
        start(str(stages[0]), algo__gamma=0.5)


def test_the_record_shows_the_programs(stages: tuple[Path, Path]) -> None:
    written = read_jsonl(stages[0].parent / "rollouts.jsonl")
    assert {row["reward"] for row in written} <= set(OUTCOMES)
    assert len(written) == 3 * 8
