"""The evaluator's labels compared with a model's greedy steps, and its fit to prefixes of known quality."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from llmrl.config import from_dotted, to_dict
from llmrl.data.chat import Chat
from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model, char_tokenizer
from llmrl.types import Task
from llmrl.verify.checks.text import edit_similarity, sentence_bleu
from llmrl.verify.models.prefix_evaluator import PrefixEvaluator
from llmrl.verify.spec import load_file

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "ircoco"
if TYPE_CHECKING:
    from recipes.ircoco import train as RECIPE
    from recipes.ircoco.evaluator import Example, generate, label_files, label_samples, train_evaluator
    from recipes.ircoco.options import FilePrefixes, PolicyStart, PrefixEvaluatorConfig, RandomStart, SamplePrefixes
else:
    RECIPE, EVALUATOR, OPTIONS = (load_file(FOLDER / f"{name}.py") for name in ("train", "evaluator", "options"))
    Example, generate, train_evaluator = EVALUATOR.Example, EVALUATOR.generate, EVALUATOR.train_evaluator
    label_files, label_samples = EVALUATOR.label_files, EVALUATOR.label_samples
    FilePrefixes, SamplePrefixes = OPTIONS.FilePrefixes, OPTIONS.SamplePrefixes
    RandomStart, PolicyStart = OPTIONS.RandomStart, OPTIONS.PolicyStart
    PrefixEvaluatorConfig = OPTIONS.PrefixEvaluatorConfig

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
    return PrefixEvaluatorConfig(num_examples=40, **given)


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
        prefixes = FilePrefixes(num_next_tokens=3, min_prefix_length=2, max_prefix_length=6)
        given = options(quality=quality, prefixes=prefixes)
        examples = label_files(model, chat, TASKS, given, seed=0)
        assert len(examples) == 40 and {len(e.ids) for e in examples} == {2, 3, 4, 5, 6}
        for example in examples:
            end = len(example.ids)
            (file,) = [file for file in files if file[:end] == example.ids and len(file) > end]
            true, made = file[end:][:3], greedy(model, example.ids, 3)
            by_text = edit_similarity(chat.decode(made), chat.decode(true))
            by_token = sentence_bleu([token for token in made if token != STOP], true)
            assert example.quality == (by_text if quality == "edit_similarity" else by_token)
            assert example.num_context == end, "the one place that is fitted is behind the prefix"


def test_labels_of_samples(model: Any, chat: Chat) -> None:
    examples = label_samples(model, chat, TASKS, options(prefixes=SamplePrefixes()), max_completion_length=6, seed=0)
    prompts = {tuple(chat.render(task.messages)): task.answer for task in TASKS}
    written = set()
    for example in examples:
        ((prompt, answer),) = [(p, a) for p, a in prompts.items() if tuple(example.ids[: len(p)]) == p]
        assert example.num_context == len(prompt)
        completion = example.ids[len(prompt) :]
        assert example.quality == pytest.approx(edit_similarity(chat.decode(completion), answer))
        written.add(tuple(completion))
    assert len(written) > 10
    assert any(STOP in completion for completion in written) and any(STOP not in completion for completion in written)


def test_files_too_short_to_be_cut(model: Any, chat: Chat) -> None:
    with pytest.raises(UserError, match="shorter than evaluator.prefixes.min_prefix_length 10"):
        label_files(model, chat, TASKS, options(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "policy"])
def test_it_learns_and_is_an_ordinary_classifier(start: str, model: Any, tmp_path: Path) -> None:
    """What is to be learned: the share of the letter b (1) among the tokens so far, where the sequence ends."""
    from transformers import AutoModelForSequenceClassification

    draw = random.Random(0)
    rows = [draw.choices(range(4), k=draw.randint(2, 8)) for _ in range(600)]
    examples = [Example(ids, len(ids), ids.count(1) / len(ids)) for ids in rows]
    begin = PolicyStart() if start == "policy" else RandomStart(hidden_size=32, num_layers=1, num_heads=2)
    given: dict[str, Any] = {"start": begin, "num_epochs": 12, "learning_rate": 5e-3}
    state = torch.get_rng_state()
    report = train_evaluator(examples, TOKENIZER, options(**given), tmp_path, policy=model, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert report["correlation"] > 0.9 and report["rmse"] < report["quality_std"]
    assert json.loads((tmp_path / "evaluator.json").read_text()) == report
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in rows[:5]]
    found = [values[-1] for values in PrefixEvaluator(str(tmp_path), device="cpu").values(rows[:5])]
    assert found == pytest.approx(expected, abs=1e-5)


def test_places_that_are_fitted(model: Any, tmp_path: Path) -> None:
    """Two qualities behind the same prompt: after it, their mean is the best guess; after what they differ in, each."""
    examples = [Example([1, 2, 3, 4], 2, 0.0), Example([1, 2, 5, 6], 2, 1.0)] * 100
    given: dict[str, Any] = {
        "start": RandomStart(hidden_size=32, num_layers=1, num_heads=2),
        "num_epochs": 12,
        "learning_rate": 5e-3,
    }
    report = train_evaluator(examples, TOKENIZER, options(**given), tmp_path, policy=model, seed=0)
    first, second = PrefixEvaluator(str(tmp_path), device="cpu").values([[1, 2, 3, 4], [1, 2, 5, 6]])
    assert [*first[1:], *second[1:]] == pytest.approx([0.5, 0, 0, 0.5, 1, 1], abs=0.05)
    assert report["rmse"] == pytest.approx((0.25 / 3) ** 0.5, abs=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prefixes": "samples", "prefixes.num_next_tokens": 5},
            "evaluator.prefixes.num_next_tokens: not read by what was chosen, but by kind files",
        ),
        (
            {"prefixes.min_prefix_length": 20, "prefixes.max_prefix_length": 10},
            "evaluator.prefixes.max_prefix_length 10 is below min_prefix_length 20",
        ),
        ({"num_examples": 5}, "evaluator.num_examples is 5: must be at least 20"),
        (
            {"start.hidden_size": 30},
            "evaluator.start.hidden_size 30 is not a multiple of twice evaluator.start.num_heads 4",
        ),
        (
            {"start": "policy", "start.num_layers": 2},
            "evaluator.start.num_layers: not read by what was chosen, but by kind random",
        ),
        ({"start.num_heads": 0}, "evaluator.start.num_heads is 0: must be at least 1"),
        ({"learning_rate": -1.0}, "evaluator.learning_rate is -1.0: must be above 0"),
        ({"weight_decay": -1.0}, "evaluator.weight_decay is -1.0: must be at least 0"),
    ],
)
def test_contradictory_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RECIPE.check_arguments(parsed(given))
    assert message in str(error.value)


def parsed(given: dict[str, Any]) -> Any:
    """Return the recipe's configuration with these options of the evaluator."""
    return from_dotted({f"evaluator.{name}": value for name, value in given.items()}, RECIPE.IRCoCoRun)


def test_an_option_is_there_where_it_is_read() -> None:
    files, samples = parsed({}).evaluator, parsed({"prefixes": "samples"}).evaluator
    assert files.prefixes == FilePrefixes(num_next_tokens=10, min_prefix_length=10, max_prefix_length=256)
    assert samples.prefixes == SamplePrefixes() and not hasattr(samples.prefixes, "num_next_tokens")
    assert files.start == RandomStart(hidden_size=256, num_layers=4, num_heads=4)
    assert parsed(to_dict(files)).evaluator == files
