"""`llmrl export`: the model of any checkpoint of a run, in a folder of its own. The run is not touched."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from llmrl.errors import RunFailed, UserError, first_line

DESCRIPTION = (
    "Write the model of a run's checkpoint, with its tokenizer and a model card, to a folder that transformers, peft "
    "and vLLM load. Nothing in the run changes."
)


def run(argv: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        UserError: there is no such run or checkpoint, or the model it began with cannot be loaded.
    """
    parser = argparse.ArgumentParser(prog="llmrl export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="the train.output_dir of a run")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export/step-N")
    parser.add_argument("--model", metavar="PATH", help="the model that the run began with, if it lies elsewhere now")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload the folder to the hub")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub private")
    given = parser.parse_args(argv)
    folder = export(given.run, step=given.step, merge=given.merge, output=given.output, model=given.model)
    print(f"model in {folder}")
    if given.push_to_hub:
        print(f"pushed to {push(folder, given.push_to_hub, private=given.private)}")
    return 0


def export(
    run: str | Path,
    *,
    step: int | None = None,
    merge: bool = False,
    output: str | Path | None = None,
    model: Any = None,
    processing_class: Any = None,
) -> Path:
    """Write the model of a checkpoint to a folder of its own.

    Args:
        run: the run's folder.
        step: which checkpoint; default the newest.
        merge: merge the adapter into the model.
        output: the folder; default RUN/export/step-N. It must not exist, or be empty.
        model: the model that the run began with, as a path or as an object, where its configuration does not name it.
        processing_class: the tokenizer; default the one that the run saved.

    Returns:
        The folder.

    Raises:
        UserError: there is no such run or checkpoint, there is nothing to merge, or the folder is taken.
    """
    from llmrl.config import RunConfig, from_dotted
    from llmrl.model.load import load_tokenizer
    from llmrl.model.parallel import Parallel
    from llmrl.run import checkpoint
    from llmrl.run.build import build_policy
    from llmrl.run.data import quieten_libraries
    from llmrl.run.given import GIVEN, Given
    from llmrl.run.model_folder import TOKENIZER, save_model
    from llmrl.track.history import part_of

    run = Path(run).expanduser()
    source = _checkpoint(run, step)
    found = checkpoint.step_of(source)
    folder = Path(output).expanduser() if output else run / "export" / f"{source.name}{'-merged' if merge else ''}"
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder with --output")
    config: RunConfig = from_dotted(part_of(run, found)["config"])
    if isinstance(model, str):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=model))
        model = None
    if model is None and config.model.path == GIVEN:
        raise UserError("the run's model was given in Python: name what it began with by --model PATH")
    # The adapter is the same on a base that is not quantized, and exporting needs no GPU.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=None))
    quieten_libraries()
    tokenizer = processing_class or load_tokenizer(dataclasses.replace(config.model, tokenizer=str(run / TOKENIZER)))
    policy = build_policy(config, Given(model=model), tokenizer, Parallel.alone(), with_critic=False)
    checkpoint.load_weights(source, policy)
    if merge:
        policy.merge_adapter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, policy, tokenizer, run=run, step=found)
    return folder


def _checkpoint(run: Path, step: int | None) -> Path:
    from llmrl.run.checkpoint import list_checkpoints, step_of

    found = {step_of(folder): folder for folder in list_checkpoints(run)}
    if not found:
        raise UserError(f"{run} holds no checkpoint: name the train.output_dir of a run")
    if step is not None and step not in found:
        raise UserError(f"--step {step}: there are checkpoints of the steps {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to the hub and return its address there.

    Raises:
        RunFailed: the hub cannot be reached, or refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        address = HfApi().create_repo(name, private=private, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=name)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise RunFailed(
            f"{folder} is complete, but was not pushed to {name} ({first_line(error)}); log in with "
            f"`hf auth login`, then `hf upload {name} {folder}`"
        ) from error
    return str(address)
