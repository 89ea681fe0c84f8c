"""The `llmrl` command. Every subcommand answers `--help`.

Exit codes: 0 done, 1 the run failed, 2 the arguments are wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmrl.errors import UserError, run_main

USAGE = """usage: llmrl COMMAND ...

  llmrl train RECIPE.yaml [--field value ...]    train; any field of the configuration, dotted; --print_config shows all
  llmrl train RECIPE.yaml --dry_run              check every row of the data and show the first; no model is loaded
  llmrl verify --reward SPEC --input rows.jsonl --output scores.jsonl    score stored completions, no model needed
  llmrl verify --reward SPEC --self-test         run a reward's own examples
  llmrl verify --red-team SPEC --input rows.jsonl    attack a reward on your own rows, and see what pays
  llmrl eval --model PATH --data SPEC --reward SPEC --samples 8 [--field value ...]    mean@k, pass@k, maj@k
  llmrl export RUN [--step N] [--merge] [--output DIR]    the model of any checkpoint, ready to load or to share
  llmrl serve RECIPE.yaml [--print_command]      vLLM servers for the recipe's model, until interrupted
  llmrl doctor [--model PATH]                    check this machine; each finding with its fix
  llmrl --version

Several processes: accelerate launch -m llmrl.cli train RECIPE.yaml ..."""


DRY_RUN = "--dry_run"


def main() -> None:
    """Entry point of the installed command."""
    run_main(lambda: sys.exit(run(sys.argv[1:])))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code.

    Raises:
        UserError: there is no such command, or its arguments are wrong.
    """
    commands = {"train": train, "verify": verify, "eval": evaluate, "serve": serve, "export": export, "doctor": doctor}
    if argv[:1] == ["--version"]:
        from llmrl import __version__

        print(__version__)
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in commands:
        raise UserError(f"llmrl: no command {argv[0]!r}\n{USAGE}")
    return commands[argv[0]](argv[1:])


def train(argv: list[str]) -> int:
    """`llmrl train RECIPE.yaml [--field value ...]`."""
    from llmrl.config import load_config

    if argv and not argv[0].startswith("-"):
        argv = ["--config", str(find_recipe(argv[0])), *argv[1:]]
    config = load_config([word for word in argv if word != DRY_RUN], prog="llmrl train RECIPE.yaml")
    if DRY_RUN in argv:
        from llmrl.run.data import dry_run

        print(dry_run(config))
        return 0
    from llmrl.run.trainer import Trainer

    Trainer(config).train()
    return 0


def verify(argv: list[str]) -> int:
    """`llmrl verify`: see `llmrl.verify.command`."""
    from llmrl.verify.command import run as run_verify
    from llmrl.verify.redteam.loop import Propose

    def make_proposer(path: str, seed: int) -> Propose:
        from llmrl.run.attacker import ModelProposer

        return ModelProposer(path, seed=seed)

    return run_verify(argv, make_proposer)


def evaluate(argv: list[str]) -> int:
    """`llmrl eval`: see `llmrl.run.evaluation`."""
    from llmrl.run.evaluation import run as run_eval

    return run_eval(argv)


def serve(argv: list[str]) -> int:
    """`llmrl serve`: see `llmrl.run.serve`."""
    from llmrl.run.serve import run as run_serve

    if argv and not argv[0].startswith("-"):
        argv = ["--config", str(find_recipe(argv[0])), *argv[1:]]
    return run_serve(argv)


def export(argv: list[str]) -> int:
    """`llmrl export`: see `llmrl.run.export`."""
    from llmrl.run.export import run as run_export

    return run_export(argv)


def doctor(argv: list[str]) -> int:
    """`llmrl doctor`: see `llmrl.doctor`."""
    from llmrl.doctor import run as run_doctor

    return run_doctor(argv)


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of one that is shipped (`grpo_gsm8k`, `recipes/grpo_gsm8k.yaml`).

    Raises:
        UserError: there is none; the shipped ones are listed.
    """
    given = Path(name)
    if given.is_file():
        return given
    package = Path(__file__).parent
    shipped = next((f for f in (package / "shipped" / "recipes", package.parent / "recipes") if f.is_dir()), package)
    found = shipped / f"{given.name.removesuffix('.yaml')}.yaml"
    if found.is_file():
        return found
    names = ", ".join(sorted(f.stem for f in shipped.glob("*.yaml")))
    raise UserError(f"recipe {name!r}: no such file, and no recipe of that name is shipped ({names})")


if __name__ == "__main__":
    main()
