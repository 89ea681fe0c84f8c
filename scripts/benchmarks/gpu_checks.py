"""The checks of scripts/gpu_check: in bfloat16, on this machine's device, against something more exact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.gpu_work import Shape, needs
from llmrl.config import ModelConfig, RolloutConfig, TrainConfig
from llmrl.errors import RunFailed
from llmrl.model.logprob_head import Head, token_logprobs
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.run.engines import start_engine
from llmrl.train.learner import Learner
from llmrl.train.packing import Layout
from llmrl.train.selfcheck import check_forward


def check_head(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Compare log-probabilities and gradients of bfloat16 operands with float64, with and without rounded logits."""
    rows, width, vocabulary = (64, 32, 500) if tiny else (2048, 896, 32_000)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 4 / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.cat([(part @ exact[1].T).log_softmax(1) for part in exact[0].split(256)])
    expected = expected.gather(1, targets[:, None])[:, 0]
    slopes = torch.autograd.grad(expected.sum(), exact)
    gaps = {}
    for float32 in (False, True):
        found = token_logprobs(hidden, Head(weight=weight, float32=float32), targets)[0]
        gradients = torch.autograd.grad(found.sum(), [hidden, weight])
        errors = [((g - s).norm() / s.norm()).item() for g, s in zip(gradients, slopes, strict=True)]
        gaps[float32] = ((found - expected).abs().max().item(), max(errors))
    ok = gaps[False][0] < 0.2 and gaps[True][0] < 1e-3 and gaps[True][1] < 0.01
    return {"ok": ok, "note": f"log-probabilities to {gaps[False][0]:.2g}, float32 head {gaps[True][0]:.2g} nats; "
            f"gradients to {gaps[True][1]:.1%}"}  # fmt: skip


def check_layouts(shape: Shape, attention: str, device: torch.device) -> dict[str, Any]:
    """Compare packed rows and shared prompts with one sequence at a time; float32 on the same tokens is the measure."""
    needs(attention, device)
    policy, layout = prepare(shape, attention, device)
    plain = shape.model(dtype=torch.float32, device=device)
    with torch.no_grad():
        plain.load_state_dict({name: tensor.float() for name, tensor in policy.causal_lm.state_dict().items()})
    exact = Policy(plain, temperature=1.0, keep_reference=False)
    samples, first = shape.samples(), shape.prompt_length - 1
    sequences = [sample.input_ids.tolist() for sample in samples]
    expected = np.concatenate([row[first:] for row in exact.sequence_logprobs(sequences)])
    alone = np.concatenate([row[first:] for row in policy.sequence_logprobs(sequences)])
    packed = [np.zeros(0)] * len(samples)
    with torch.no_grad():
        for micro_batch in layout.micro_batches(samples):
            found = policy.forward(micro_batch).logprobs.float().cpu().numpy()
            pieces = np.split(found, np.cumsum([s.num_tokens for s in micro_batch.samples])[:-1])
            for index, piece in zip(micro_batch.sample_indices, pieces, strict=True):
                packed[index] = piece
    rounding, gap = np.abs(alone - expected).mean(), np.abs(np.concatenate(packed) - alone).mean()
    shared = "shared prompts" if policy.can_share_prefixes else "no shared prompts"
    note = f"packed against alone {gap:.2g} nats, bfloat16 against float32 {rounding:.2g}; {shared}"
    return {"ok": bool(gap <= 2 * rounding + 1e-6), "note": note}


def prepare(shape: Shape, attention: str, device: torch.device) -> tuple[Policy, Layout]:
    """Return a policy in bfloat16 that has passed the run's own check, and its layout."""
    parallel = Parallel(Accelerator(cpu=device.type == "cpu"))
    model = shape.model(dtype=torch.bfloat16, device=device, attention=attention)
    policy = Policy(model, temperature=1.0, keep_reference=False, dtype=torch.bfloat16)
    check_forward(policy)
    return policy, Learner(policy, TrainConfig(), parallel).layout


async def check_sync(shape: Shape, parallel: Parallel) -> dict[str, Any]:
    """Push weights to the hf engine twice; then drop a push, which has to be noticed."""
    model = shape.model(dtype=torch.bfloat16, device=parallel.device)
    policy = Policy(model, temperature=1.0, keep_reference=False, dtype=torch.bfloat16)
    options = ModelConfig(path="unused", dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        engine, push = start_engine(options, RolloutConfig(engine="hf"), policy, parallel, log_dir=Path(folder))
        receipts = [await push(0)]
        move(policy)
        receipts.append(await push(1))
        move(policy)

        async def dropped(source: Any, *, version: int) -> None:
            pass

        engine.load_weights = dropped  # pyright: ignore[reportAttributeAccessIssue]
        try:
            await push(2)
            return {"ok": False, "note": "a push that never arrived was not noticed"}
        except RunFailed:
            gaps = ", ".join(f"{receipt.max_gap:.2g}" for receipt in receipts)
            return {"ok": True, "note": f"gaps {gaps} nats; a dropped push was noticed"}
        finally:
            await engine.close()


@torch.no_grad()
def move(policy: Policy) -> None:
    """Change the weights by far more than they are rounded."""
    for parameter in policy.causal_lm.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.std(), alpha=0.3)
