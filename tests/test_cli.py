"""What a user gets wrong: exit code 2 and one message that says what and where, before any model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.cli import find_recipe, run
from llmrl.config import check, load_config, parse, save_config
from llmrl.errors import RunFailed, UserError, run_main
from llmrl.tiny import build_tiny_model, byte_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1 = ?", "answer": str(i + 1)}) + "\n" for i in range(8)))
    return file


def arguments(rows: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "train",
        str(REPOSITORY / "recipes" / "grpo_gsm8k_tiny.yaml"),
        "--data.path",
        str(rows),
        "--train.output_dir",
        str(tmp_path / "run"),
        *more,
    ]


def refused(argv: list[str]) -> str:
    """The message of a command that must not start."""
    with pytest.raises(UserError) as caught:
        run(argv)
    return str(caught.value)


def test_unknown_option_wrong_type_and_wrong_choice(rows: Path, tmp_path: Path) -> None:
    assert "learning_rat" in refused(arguments(rows, tmp_path, "--train.learning_rat", "1"))
    message = refused(arguments(rows, tmp_path, "--rollout.num_prompts", "1.5"))
    assert "rollout.num_prompts" in message
    assert "1.5" in message
    assert "rollout.engine" in refused(arguments(rows, tmp_path, "--rollout.engine", "magic"))
    assert not (tmp_path / "run").exists()


def test_abbreviations_are_not_guessed(rows: Path, tmp_path: Path) -> None:
    assert "train.lr" in refused(arguments(rows, tmp_path, "--train.lr", "1"))


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("train:\n  max_steps: 3\n  lerning_rate: 1\n", 3, "train.lerning_rate"),
        ("train:\n  max_steps: many\n", 2, "train.max_steps"),
        ("model:\n  path: x\n  lora: {rank: 3}\n", 3, "model.lora.rank"),
        ("rewards:\n  - fn: a\n    wieght: 2\n", 3, "wieght"),
        ("trian:\n  max_steps: 3\n", 2, "trian"),
    ],
)
def test_mistakes_in_a_file_are_found_by_line_and_field(text: str, line: int, field: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(file)])
    assert f"{file}, line {line}" in str(caught.value)
    assert field in str(caught.value)


def test_missing_files_and_specs(rows: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(["train", "--config", str(tmp_path / "absent.yaml")])
    assert "grpo_gsm8k_tiny" in refused(["train", "absent"])
    absent = refused(arguments(rows, tmp_path, "--data.path", str(tmp_path / "rosw.jsonl")))
    assert "did you mean" in absent
    spec = refused(arguments(rows, tmp_path, "--rewards", "[{fn: math_anser}]"))
    assert "math_anser" in spec
    assert "math_answer" in spec


def test_model_folder_without_tokenizer(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_tiny_model("qwen3", vocab_size=300).save_pretrained(folder)
    message = refused(arguments(rows, tmp_path, "--model.path", str(folder), "--model.lora", "null"))
    assert "tokenizer" in message
    assert "--model.tokenizer" in message


def test_folder_without_model(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(folder)
    assert "cannot be loaded" in refused(arguments(rows, tmp_path, "--model.path", str(folder)))


def test_row_without_answer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?"}\n')
    message = refused(arguments(file, tmp_path))
    assert "line 2" in message
    assert "answer" in message


def test_contradictions_are_all_listed() -> None:
    config = parse(["--rollout.num_generations", "1", "--rollout.top_p", "0.9", "--rollout.temperature", "0"])
    with pytest.raises(UserError) as caught:
        check(config)
    for field in ("model.path", "data.path", "rewards", "num_generations", "top_p", "temperature"):
        assert field in str(caught.value)


def test_a_run_is_not_written_over(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert "resume_from_checkpoint last" in refused(arguments(rows, tmp_path))
    assert "holds no run" in refused(
        [
            *arguments(rows, tmp_path, "--train.resume_from_checkpoint", "last"),
            "--train.output_dir",
            str(tmp_path / "b"),
        ]
    )


def test_resolved_configuration_is_read_back(rows: Path, tmp_path: Path) -> None:
    config = load_config(["--config", str(find_recipe("grpo_gsm8k")), "--train.learning_rate", "3e-6"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert config.train.learning_rate == 3e-6


@pytest.mark.slow
def test_processes_exit_with_2_and_no_traceback(rows: Path, tmp_path: Path) -> None:
    argv = arguments(rows, tmp_path, "--train.max_step", "3")
    for command in (
        [sys.executable, "-m", "llmrl.cli", *argv],
        [sys.executable, "recipes/grpo.py", "--config", *argv[1:]],
    ):
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert found.returncode == 2, found
        assert found.stderr.startswith("error: ")
        assert "Traceback" not in found.stderr
        assert "max_step" in found.stderr


def test_what_a_model_wrote_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RunFailed("a completion: \x1b]0;owned\x07\x1b[2J\r\x9b1m\u202eabc\ud800\nnext\tline é 中")

    with pytest.raises(SystemExit):
        run_main(main)
    shown = capsys.readouterr().err
    wanted = r"error: a completion: \x1b]0;owned\x07\x1b[2J\r\x9b1m\u202eabc\ud800"
    assert shown == f"{wanted}\nnext\tline é 中\n"


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted")
    assert error.count("\n") == 1


def test_commands_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "llmrl train" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert "no command 'trian'" in refused(["trian"])
