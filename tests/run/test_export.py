"""Models out: of any step, whole, as an adapter or merged, with the template and the facts of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from llmrl import Trainer
from llmrl.cli import run as llmrl
from llmrl.errors import RunFailed, UserError
from llmrl.run.checkpoint import list_checkpoints
from llmrl.run.export import export, push
from llmrl.tiny import build_tiny_model, byte_tokenizer

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"{i}+{i}?", "answer": str(2 * i)} for i in range(8)]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eos|>{% endfor %}[assistant] "


def letters(completion: str) -> float:
    return sum(map(ord, completion)) % 7 / 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    build_tiny_model(
        "qwen2", vocab_size=len(tokenizer), num_heads=2, num_kv_heads=1, eos_token_id=257, pad_token_id=256
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(folder: Path, model: Any, *, steps: int = 2, **more: Any) -> dict[str, float]:
    options = {
        "train.output_dir": str(folder),
        "train.max_steps": steps,
        "train.learning_rate": 1e-2,
        "train.save_steps": 1,
        "train.save_total_limit": 0,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 4,
        "track.console": "plain",
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return Trainer(options, model=model, reward=letters, train_dataset=ROWS).train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def files(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_a_model_of_any_step_and_the_run_is_not_touched(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, base)
    before = files(run)
    last, first = export(run, output=tmp_path / "last"), export(run, step=1)
    assert first == run / "export" / "step-00000001"
    assert before.items() <= files(run).items()
    for name, tensor in weights(run / "model").items():
        assert torch.equal(tensor, weights(last)[name]), name
    found, trained = weights(first), weights(run / "model")
    assert any(not torch.equal(found[name], trained[name]) for name in found), "step 1 is not step 2"
    assert AutoTokenizer.from_pretrained(first).encode("a") == [97]
    with pytest.raises(UserError, match="not empty"):
        export(run, step=1)
    with pytest.raises(UserError, match=r"--step 7: there are checkpoints of the steps 1, 2"):
        export(run, step=7)
    with pytest.raises(UserError, match="nothing|no adapter"):
        export(run, step=1, merge=True, output=tmp_path / "merged")


def test_an_adapter_alone_or_merged(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, base, model__lora={"r": 4})
    assert llmrl(["export", str(run), "--step", "2", "--output", str(tmp_path / "adapter")]) == 0
    merged = weights(export(run, step=2, merge=True))
    import peft

    own = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model")
    expected = own.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, merged[name]), name
    exported = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    for name, tensor in exported.merge_and_unload().state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def test_a_critic_is_left_behind(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, base, algo__name="ppo", critic__kind="shared", algo__num_mini_batches=1)
    found = weights(export(run))
    for name, tensor in weights(run / "model").items():
        assert torch.equal(tensor, found[name]), name


def test_the_template_of_the_training_is_saved(base: str, tmp_path: Path) -> None:
    template, run = tmp_path / "my.jinja", tmp_path / "run"
    template.write_text(TEMPLATE)
    train(run, base, steps=1, data__chat_template=str(template))
    template.unlink()
    for folder in (run / "model", export(run)):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], tokenize=False)
        assert text == "[user] 2+2?<|eos|>[assistant] "


def test_the_card_has_the_facts_of_the_run(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = train(run, base)
    text = (run / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["tags"] == ["llmrl", "grpo"]
    assert "base_model" not in front, "a local folder is no name on the hub"
    assert f"| reward/mean, step 2 | {metrics['reward/mean']:.4g} |" in text
    assert "`letters` (weight 1)" in text and "| learning rate | 0.01 |" in text
    config = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert config == yaml.safe_load((run / "config.yaml").read_text())


def test_a_model_given_in_python_has_to_be_named(base: str, tmp_path: Path) -> None:
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(base)
    options = {"train.output_dir": str(run), "train.max_steps": 1, "rollout.num_prompts": 2, "track.console": "plain"}
    options |= {"rollout.num_generations": 2, "rollout.max_completion_length": 4, "train.learning_rate": 1e-2}
    model = AutoModelForCausalLM.from_pretrained(base)
    Trainer(options, model=model, processing_class=tokenizer, reward=letters, train_dataset=ROWS).train()
    with pytest.raises(UserError, match="--model PATH"):
        export(run)
    assert not (run / "export").exists()
    found = weights(export(run, model=base))
    for name, tensor in weights(run / "model").items():
        assert torch.equal(tensor, found[name]), name


def test_a_branch_and_a_changed_option_are_kept(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(old, base, steps=3)
    before = files(old)
    checkpoint = str(old / "checkpoints" / "step-00000002")
    with pytest.raises(UserError, match=r"later checkpoints \(step-00000003\)"):
        train(old, base, steps=3, train__resume_from_checkpoint=checkpoint)
    assert files(old) == before
    train(new, base, steps=4, train__resume_from_checkpoint=checkpoint, train__learning_rate=5e-6)
    said = capsys.readouterr().out
    assert "a branch of" in said and "train.learning_rate 0.01 -> 5e-06" in said
    assert files(old) == before
    steps = [json.loads(line)["step"] for line in (new / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    assert yaml.safe_load((new / "config.yaml").read_text())["train"]["learning_rate"] == 5e-6
    parts = [json.loads(line) for line in (new / "history.jsonl").open()]
    assert [(p["from_step"], p["config"]["train"]["learning_rate"]) for p in parts] == [(0, 1e-2), (2, 5e-6)]
    assert parts[1]["resumed_from"] == checkpoint
    assert "| learning rate | 0.01 |" in (export(new, step=2) / "README.md").read_text()


def test_going_on_with_a_checkpoint_of_another_model_leaves_nothing_behind(base: str, tmp_path: Path) -> None:
    train(tmp_path / "old", base, steps=1)
    with pytest.raises(UserError, match="another model"):
        train(tmp_path / "new", "tiny:llama", steps=2, train__resume_from_checkpoint=str(tmp_path / "old"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == []


def test_a_branch_goes_on_as_the_run_itself_would(base: str, tmp_path: Path) -> None:
    train(tmp_path / "whole", base, steps=3)
    train(tmp_path / "old", base, steps=2, train__save_steps=2)
    train(tmp_path / "new", base, steps=3, train__resume_from_checkpoint=str(tmp_path / "old"))
    expected = weights(tmp_path / "whole" / "model")
    for name, tensor in weights(tmp_path / "new" / "model").items():
        assert torch.equal(tensor, expected[name]), name
    assert list_checkpoints(tmp_path / "new")[-1].name == "step-00000003"


def test_what_a_multi_modal_checkpoint_holds_beside_the_language_model_is_kept(tmp_path: Path) -> None:
    folder, run = tmp_path / "vision", tmp_path / "run"
    text = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "bos_token_id": None, "eos_token_id": 257,
        "pad_token_id": 256,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 258)
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, **tokens)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    train(run, str(folder), steps=1, train__packing=False)
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(run / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)
    architectures = json.loads((run / "model" / "config.json").read_text())["architectures"]
    assert architectures == ["Qwen3_5ForConditionalGeneration"]
    assert (run / "model" / "preprocessor_config.json").is_file()


def test_a_push_that_fails_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunFailed, match=r"is complete, but was not pushed to me/x .*hf auth login.*hf upload me/x"):
        push(tmp_path, "me/x", private=True)


def test_a_full_disk_keeps_the_model_that_was_there(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train(run, base, steps=1)
    before = files(run / "model")

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmrl.run.model_folder.model_card", full)
    with pytest.raises(RunFailed, match=r"could not be written.*No space left.*llmrl export"):
        train(run, base, steps=1, train__resume_from_checkpoint="last")
    assert files(run / "model") == before
    assert not list(run.glob(".writing-*"))
