"""Every command in docs/scaling.md is one that bash, accelerate and llmrl understand, and every option it names is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.cli import find_recipe
from llmrl.config import load_config, parse

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", TEXT, re.MULTILINE)
STUB = f"""#!{sys.executable}
import json, sys
print(json.dumps([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]))
"""
BLANKS = {"--machine_rank R": "--machine_rank 3"}
"""What a reader fills in."""


def commands() -> list[str]:
    """The indented blocks, cut into one command each."""
    return [command for block in BLOCKS for command in re.split(r"\n\s*\n", block) if command.strip()]


def words(command: str, folder: Path) -> list[str]:
    """The words that bash makes of a command whose program only says what it was given."""
    for program in ("accelerate", "llmrl"):
        (folder / program).write_text(STUB)
        (folder / program).chmod(0o755)
    for blank, filled in BLANKS.items():
        command = command.replace(blank, filled)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    found = subprocess.run(["bash", "-euc", command], env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and not found.stderr, found.stderr
    return json.loads(found.stdout)


def test_there_are_as_many_as_the_page_shows() -> None:
    assert sum(TEXT.count(f"    {start}") for start in ("accelerate launch", "CUDA_VISIBLE", "llmrl serve")) == len(
        commands()
    )


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.strip()[:40])
def test_a_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    program, kind, *rest = words(command, tmp_path)
    if program == "llmrl":
        assert kind == "serve"
        parse(["--config", str(find_recipe(rest[0])), *rest[1:]])
        return
    from accelerate.commands.launch import launch_command_parser

    assert kind == "launch"
    parsed = launch_command_parser().parse_args(rest)
    assert Path(parsed.config_file).is_file() and Path(parsed.training_script).is_file()
    config = load_config(parsed.training_script_args)
    assert parsed.num_processes is None or parsed.num_processes % (parsed.num_machines or 1) == 0
    urls = config.rollout.server.urls if config.rollout.server else []
    assert ("vllm_server" in command) == bool(urls)
