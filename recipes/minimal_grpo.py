"""All of GRPO in one file: sample, score, compare within the group, step. The quickstart's additions on one CPU core.

    python recipes/minimal_grpo.py                       # warm start, then 40 steps of GRPO: about a minute
    python recipes/minimal_grpo.py --seed 1 --steps 60
    python recipes/minimal_grpo.py --clip_high 0.28      # DAPO's clip-higher

Read it from top to bottom. Nothing here is fast or general: sequences are padded, every token is sampled with a full
forward pass over the prefix, and there is one process. `llmrl` computes the same update packed, sharded and streamed;
docs/algorithms/ shows what each line becomes there. Only the model, its tokenizer and the task come from elsewhere.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from typing import Any

import quickstart as task  # recipes/quickstart.py: prompts, correct completions, the split
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmrl.tiny import build_tiny_model, char_tokenizer

BOX = re.compile(r"\\boxed\{(\d+)\}")


# --- 1 prompt ---------------------------------------------------------------------------------------------------------


class Prompts:
    """Draw prompts. They all have the same length, so they form a rectangle without padding."""

    def __init__(self, pairs: list[tuple[int, int]], tokenizer: Any, seed: int) -> None:
        self.pairs, self.tokenizer, self.random = pairs, tokenizer, random.Random(seed)

    def next(self, count: int) -> tuple[Tensor, list[int]]:
        """Return `count` prompts as (token ids [P, L], answers)."""
        chosen = self.random.sample(self.pairs, count)
        texts = [task.prompt(a, b) for a, b in chosen]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return torch.tensor(ids), [a + b for a, b in chosen]


# --- 2 rollout --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: Any, prompts: Tensor, *, max_new: int, eos: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Complete every row. Returns (token ids [N, L + T], mask [N, T]: True up to and including the end of sequence).

    temperature 0 is greedy.
    """
    ids, length = prompts, prompts.shape[1]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    mask = []
    for _ in range(max_new):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]  # a cache would be faster and longer to read
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        token = torch.where(done, eos, token)  # finished rows are padded with the end of sequence
        mask.append(~done)
        ids = torch.cat([ids, token[:, None]], dim=1)
        done = done | (token == eos)
        if done.all():
            break
    return ids, torch.stack(mask, dim=1) if mask else torch.zeros(len(ids), ids.shape[1] - length, dtype=torch.bool)


# --- 3 verify ---------------------------------------------------------------------------------------------------------


def verify(text: str, answer: int) -> float:
    """Return 1 when the text ends in its only box and that box holds the sum, else 0."""
    boxes = BOX.findall(text)
    return float(len(boxes) == 1 and text.endswith("}") and boxes[0] == str(answer))


# --- 4 advantage ------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor) -> Tensor:
    """A = (r - mean of its group) / (deviation of its group): [P, G] -> [P, G].

    Rollouts that are better than the others of their group become likelier, worse ones less likely. A group whose
    rewards are all equal teaches nothing.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std(dim=1, keepdim=True) + 1e-4)


# --- 5 loss -----------------------------------------------------------------------------------------------------------


def token_logprobs(model: Any, ids: Tensor, length: int) -> Tensor:
    """Compute log p(token | everything before it) of the completion's tokens: [N, T]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, length - 1 : -1]  # logits at t - 1 predict token t
    return logits.log_softmax(-1).gather(2, ids[:, length:, None])[:, :, 0]


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), averaged over all sampled tokens.

    The ratio measures how much likelier the policy has made a token since it was sampled. Once it has moved far enough
    in the direction of A, the clipped branch is the smaller one and the token has no gradient.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return (losses * mask).sum() / mask.sum()


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(model: Any, tokenizer: Any, prompts: Prompts, options: argparse.Namespace) -> None:
    """Repeat: prompt -> rollout -> verify -> advantage -> loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        prompt_ids, answers = prompts.next(options.prompts)
        length = prompt_ids.shape[1]
        ids, mask = sample(
            model,
            prompt_ids.repeat_interleave(options.group, dim=0),
            max_new=options.max_new,
            eos=tokenizer.eos_token_id,
        )
        texts = decode(tokenizer, ids[:, length:], mask)
        rewards = torch.tensor([verify(text, answers[i // options.group]) for i, text in enumerate(texts)])
        advantages = group_advantages(rewards.view(options.prompts, options.group)).flatten()
        with torch.no_grad():  # fixed during the updates below; equal to `logprobs` in the first one
            old_logprobs = token_logprobs(model, ids, length)
        for _ in range(options.updates):
            logprobs = token_logprobs(model, ids, length)
            bounds = {"clip_low": options.clip_low, "clip_high": options.clip_high}
            loss = grpo_loss(logprobs, old_logprobs, advantages, mask, **bounds)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1.0, step / 5)
            optimizer.step()
        if step % 5 == 0 or step == 1:
            mean_length = mask.sum().item() / len(ids)
            seconds = time.perf_counter() - start
            print(f"step {step:3d}  reward {rewards.mean():.2f}  length {mean_length:.1f}  {seconds:.2f} s", flush=True)


def decode(tokenizer: Any, completions: Tensor, mask: Tensor) -> list[str]:
    """Return the texts up to the end of sequence."""
    rows = [row[keep].tolist() for row, keep in zip(completions, mask, strict=True)]
    return [tokenizer.decode([t for t in row if t != tokenizer.eos_token_id]) for row in rows]


def accuracy(model: Any, tokenizer: Any, pairs: list[tuple[int, int]], *, max_new: int, temperature: float) -> float:
    """Return the share of held-out prompts that are answered correctly."""
    prompt_ids, answers = Prompts(pairs, tokenizer, seed=0).next(len(pairs))
    ids, mask = sample(model, prompt_ids, max_new=max_new, eos=tokenizer.eos_token_id, temperature=temperature)
    texts = decode(tokenizer, ids[:, prompt_ids.shape[1] :], mask)
    return sum(verify(text, answer) for text, answer in zip(texts, answers, strict=True)) / len(pairs)


# --- where the policy comes from --------------------------------------------------------------------------------------


def warm_start(options: argparse.Namespace) -> tuple[Any, Any]:
    """Train a tiny model on examples until a third of its answers are correct: RL needs successes to compare with."""
    tokenizer = char_tokenizer(task.ALPHABET, [task.THINK, task.END_THINK, task.BOX])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = build_tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        max_position_embeddings=128,
        seed=options.seed,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    draw, pairs = random.Random(options.seed), task.pairs(held_out=False)
    held_out = random.Random(1).sample(task.pairs(held_out=True), 128)
    for step in range(1, options.warm_start_steps + 1):
        prompts, answers = [], []
        for a, b in draw.sample(pairs, 16):
            text = task.completion(a, b, scratchpad=draw.random() < 0.4)
            prompts.append(tokenizer(task.prompt(a, b), add_special_tokens=False)["input_ids"])
            answers.append([*tokenizer(text, add_special_tokens=False)["input_ids"], eos])
        width = max(map(len, answers))
        ids = torch.tensor([p + a + [pad] * (width - len(a)) for p, a in zip(prompts, answers, strict=True)])
        labels = torch.tensor([a + [-100] * (width - len(a)) for a in answers])
        logits = model(input_ids=ids).logits[:, len(prompts[0]) - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 300 and step % 50 == 0:
            found = accuracy(model, tokenizer, held_out, max_new=options.max_new, temperature=1.0)
            print(f"warm start: step {step}, sampled accuracy {found:.2f}", flush=True)
            if found >= options.target:
                break
    return model, tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="batches of rollouts")
    parser.add_argument("--prompts", type=int, default=16, help="P, prompts per batch")
    parser.add_argument("--group", type=int, default=8, help="G, rollouts per prompt")
    parser.add_argument(
        "--updates", type=int, default=1, help="optimizer steps per batch; above 1 the clipping is at work"
    )
    parser.add_argument("--max_new", type=int, default=32, help="tokens per rollout")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--clip_low", type=float, default=0.2)
    parser.add_argument("--clip_high", type=float, default=0.2)
    parser.add_argument("--warm_start_steps", type=int, default=2000, help="at most")
    parser.add_argument("--target", type=float, default=0.33, help="sampled accuracy at which the warm start ends")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    model, tokenizer = warm_start(options)
    held_out = random.Random(0).sample(task.pairs(held_out=True), 256)

    def show(when: str) -> None:
        greedy, sampled = (
            accuracy(model, tokenizer, held_out, max_new=options.max_new, temperature=t) for t in (0.0, 1.0)
        )
        print(f"{when}: held-out accuracy {greedy:.3f} greedy, {sampled:.3f} sampled", flush=True)

    show("before")
    train(model, tokenizer, Prompts(task.pairs(held_out=False), tokenizer, options.seed), options)
    show("after")


if __name__ == "__main__":
    main()
