"""The evaluator's labels against a model's own greedy steps, and its fit to prefixes of known quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.config import PrefixEvaluatorConfig
from llmrl.config.ircoco import resolve_evaluator
from llmrl.data.chat import Chat
from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model, char_tokenizer
from llmrl.train.prefix_evaluator import Prefix, generate, label_prefixes, train_evaluator
from llmrl.types import Task
from llmrl.verify.prefix_evaluator import PrefixEvaluator
from llmrl.verify.text_metrics import edit_similarity, sentence_bleu

TOKENIZER = char_tokenizer("abcdefgh\n")
STOP = TOKENIZER.eos_token_id
TASKS = [
    Task(id=str(i), messages=[{"role": "user", "content": prompt}], answer=answer)
    for i, (prompt, answer) in enumerate([("abc\n", "defgh"), ("a\n", "bbbbbb"), ("hgf\n", "ed")])
]


@pytest.fixture(scope="module")
def model() -> Any:
    eos = TOKENIZER.eos_token_id
    model = build_tiny_model("qwen2", vocab_size=len(TOKENIZER), hidden_size=32, eos_token_id=eos, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(TOKENIZER, prompt_format="text")


def greedy(model: Any, ids: list[int], limit: int) -> list[int]:
    """One plain forward pass per token."""
    found: list[int] = []
    while len(found) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        found.append(token)
        if token == STOP:
            break
    return found


def options(**given: Any) -> PrefixEvaluatorConfig:
    return resolve_evaluator(PrefixEvaluatorConfig(num_prefixes=40, **given))


def test_greedy_continuations_of_unlike_length(model: Any, chat: Chat) -> None:
    prompts = [[1], [1, 2, 3, 4], [5, 5], [8, 1, 2, 3, 4, 5, 6]]
    assert generate(model, chat, prompts, max_new_tokens=5) == [greedy(model, ids, 5) for ids in prompts]
    state = torch.get_rng_state()
    drawn = [generate(model, chat, prompts, max_new_tokens=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(row) <= 5 for row in drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_of_files(model: Any, chat: Chat) -> None:
    files = [chat.encode(str(task.messages[0].get("content")) + task.answer) for task in TASKS]
    for quality in ("edit_similarity", "bleu"):
        given = options(quality=quality, num_next_tokens=3, min_prefix_length=2, max_prefix_length=6)
        prefixes = label_prefixes(model, chat, TASKS, given, max_completion_length=9, seed=0)
        assert len(prefixes) == 40 and {len(p.ids) for p in prefixes} == {2, 3, 4, 5, 6}
        for prefix in prefixes:
            (file,) = [file for file in files if file[: len(prefix.ids)] == prefix.ids and len(file) > len(prefix.ids)]
            true, made = file[len(prefix.ids) :][:3], greedy(model, prefix.ids, 3)
            by_text = edit_similarity(chat.decode(made), chat.decode(true))
            by_token = sentence_bleu([token for token in made if token != STOP], true)
            assert prefix.quality == (by_text if quality == "edit_similarity" else by_token)


def test_labels_of_samples(model: Any, chat: Chat) -> None:
    prefixes = label_prefixes(model, chat, TASKS, options(prefixes="samples"), max_completion_length=6, seed=0)
    prompts = {tuple(chat.render(task.messages)): task.answer for task in TASKS}
    written = set()
    for prefix in prefixes:
        ((prompt, answer),) = [(p, a) for p, a in prompts.items() if tuple(prefix.ids[: len(p)]) == p]
        begun = prefix.ids[len(prompt) :]
        whole = begun if STOP in begun else begun + greedy(model, prefix.ids, 6 - len(begun))
        assert prefix.quality == pytest.approx(edit_similarity(chat.decode(whole), answer))
        written.add(tuple(begun))
    assert len(written) > 10
    assert any(STOP in begun for begun in written) and any(STOP not in begun for begun in written)


def test_files_too_short_to_be_cut(model: Any, chat: Chat) -> None:
    with pytest.raises(UserError, match="shorter than evaluator.min_prefix_length 10"):
        label_prefixes(model, chat, TASKS, options(), max_completion_length=6, seed=0)


def test_it_learns_and_is_an_ordinary_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    draw = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, 4, (int(torch.randint(2, 9, (1,), generator=draw)),), generator=draw).tolist()
        for _ in range(600)
    ]
    prefixes = [Prefix(ids, ids.count(1) / len(ids)) for ids in rows]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_epochs": 12,
        "learning_rate": 5e-3,
    }
    state = torch.get_rng_state()
    report = train_evaluator(prefixes, TOKENIZER, options(**sizes), tmp_path, vocab_size=len(TOKENIZER), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert report["correlation"] > 0.9 and report["rmse"] < report["quality_std"]
    assert json.loads((tmp_path / "evaluator.json").read_text()) == report
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in rows[:5]]
    found = [values[-1] for values in PrefixEvaluator(str(tmp_path), device="cpu").values(rows[:5])]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prefixes": "samples", "num_next_tokens": 5}, "num_next_tokens is only read with evaluator.prefixes files"),
        ({"min_prefix_length": 20, "max_prefix_length": 10}, "max_prefix_length 10 is below min_prefix_length 20"),
        ({"num_prefixes": 5}, "a tenth is held out"),
        ({"hidden_size": 30}, "no multiple of twice evaluator.num_heads 4"),
        ({"num_heads": 0}, "evaluator.num_heads is 0: must be above 0"),
        ({"learning_rate": -1.0}, "evaluator.learning_rate is -1.0"),
        ({"weight_decay": -1.0}, "must not be negative"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_evaluator(PrefixEvaluatorConfig(**given))
    assert said in str(error.value)


def test_gaps_are_filled_where_they_are_read() -> None:
    files, samples = PrefixEvaluatorConfig(), PrefixEvaluatorConfig(prefixes="samples")
    assert resolve_evaluator(files).num_next_tokens == 10 and resolve_evaluator(samples).num_next_tokens is None
    assert resolve_evaluator(resolve_evaluator(files)) == resolve_evaluator(files)
