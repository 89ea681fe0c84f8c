"""Reward models: batched scores equal single ones, groups share forward passes, servers speak vLLM's protocol."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.errors import UserError
from llmrl.types import Message
from llmrl.verify.models.classifier import RewardModel, get_reward_model
from llmrl.verify.rows import row_to_rollout
from llmrl.verify.rubric import Part
from tests.verify.classifiers import save_classifier
from tests.verify.rollouts import score_together

SPEC = "rewards/reward_model.py:reward_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("rm"))


def conversation(text: str) -> list[Message]:
    return [Message(role="user", content="Say something."), Message(role="assistant", content=text)]


def test_batched_scores_equal_single_ones(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = RewardModel(str(folder), device="cpu", dtype="float32", max_length=200, max_tokens=300)
    texts = ["", "short", "a rather longer answer than that" * 3, "x" * 5000, "\ud800 broken"]
    sequences = [model.encode(conversation(text)) for text in texts]
    assert max(map(len, sequences)) == 200
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
    assert model.scores(sequences) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) > 2


def test_groups_that_arrive_together_share_a_forward_pass(folder: Path) -> None:
    model = RewardModel(str(folder), device="cpu", dtype="float32", max_length=200, max_tokens=10_000)
    sizes: list[int] = []
    forward = model._forward
    model._forward = lambda sequences: (sizes.append(len(sequences)), forward(sequences))[1]  # pyright: ignore

    async def main() -> list[list[float]]:
        return await asyncio.gather(*(model([conversation(f"{g} {i}") for i in range(3)]) for g in range(4)))

    found = asyncio.run(main())
    assert sizes == [12]
    expected = [model.scores([model.encode(conversation(f"{g} {i}")) for i in range(3)]) for g in range(4)]
    assert [x for group in found for x in group] == pytest.approx([x for group in expected for x in group], abs=1e-4)


def score(args: dict[str, Any], texts: list[str]) -> list[Any]:
    rollouts = [row_to_rollout({"prompt": "Say something.", "completion": text}, name="r") for text in texts]
    score_together([Part(fn=SPEC, args=args)], rollouts)
    return [rollout.score for rollout in rollouts]


def test_as_a_reward_by_spec(folder: Path) -> None:
    found = score({"model": str(folder), "options": {"device": "cpu", "max_length": 200}}, ["one", "two"])
    model = get_reward_model(str(folder), device="cpu", max_length=200)
    assert isinstance(model, RewardModel)
    expected = model.scores([model.encode(conversation(text)) for text in ("one", "two")])
    assert [s.reward for s in found] == pytest.approx(expected, abs=1e-5)


def test_over_http_a_failure_is_an_error_of_one_rollout() -> None:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = body["messages"][-1]["content"]
            ok = text != "bad"
            reply = json.dumps({"data": [{"index": 0, "probs": [float(len(text))]}]} if ok else {"data": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        found = score({"model": "rm", "base_url": url, "options": {"retries": 0}}, ["four", "bad", "sixsix"])
    finally:
        server.shutdown()
    assert [s.reward for s in found] == [4.0, None, 6.0]
    assert "expected data[0].probs" in found[1].error
    assert asked[0]["model"] == "rm" and asked[0]["use_activation"] is False
    assert asked[0]["messages"][0] == {"role": "user", "content": "Say something."}


def test_a_folder_without_a_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        get_reward_model(str(tmp_path / "nothing"))


def test_heron_ranks_a_group_by_the_rewards_beside_it() -> None:
    def right(completion: str) -> float:
        return float("4" in completion)

    def brief(completion: str) -> float:
        return -float(len(completion))

    levels = [{"part": "right"}, {"part": "brief"}]
    parts = [
        Part(fn=right, weight=0.0),
        Part(fn=brief, weight=0.0),
        Part(fn="rewards/heron.py:heron", args={"levels": levels}),
    ]
    texts = ["4", "it is 4", "5", "it is 5"]
    rollouts = [row_to_rollout({"prompt": "2 + 2?", "completion": text}, name="r") for text in texts]
    score_together(parts, rollouts)
    assert [r.score.reward for r in rollouts if r.score] == pytest.approx([1, 1 / 3, -1 / 3, -1])
