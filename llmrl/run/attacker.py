"""A local model that proposes exploits of a reward (`llmrl verify --red-team`): requests in, replies out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.data.chat import Chat
    from llmrl.engines.base import Engine

MAX_TOKENS = 256
TEMPERATURE = 1.0


class ModelProposer:
    """Samples replies with the `hf` engine. The model is loaded at once, and served at the first request.

    Args:
        path: folder of the model.
        seed: of the samples.
    """

    def __init__(self, path: str, *, seed: int) -> None:
        from llmrl.data.chat import Chat
        from llmrl.model.load import load_generation_config, load_model, load_tokenizer, model_limits
        from llmrl.model.options import ModelConfig
        from llmrl.model.parallel import make_parallel
        from llmrl.model.policy import Policy
        from llmrl.rollout.options import SamplingConfig
        from llmrl.run.data import quieten_libraries
        from llmrl.run.engines import start_engine

        quieten_libraries()
        options = ModelConfig(path=path)
        tokenizer: Any = load_tokenizer(options)
        self.chat: Chat = Chat(
            tokenizer,
            prompt_format="chat" if tokenizer.chat_template else "text",
            generation_config=load_generation_config(options),
        )
        parallel = make_parallel(seed=seed, dtype=options.dtype)
        model: Any = load_model(options, tokenizer, seed=seed)
        policy = Policy(model.to(parallel.device), temperature=1.0, keep_reference=False)
        rollout = SamplingConfig(max_completion_length=MAX_TOKENS)
        self.engine: Engine
        self.engine, self._push = start_engine(options, rollout, policy, parallel, log_dir=Path("servers"))
        context = model_limits(options).context or 1 << 20
        self.max_tokens = min(MAX_TOKENS, context // 2)
        self.max_prompt = context - self.max_tokens
        self._seed, self._asked, self._serves = seed, 0, False

    async def __call__(self, requests: list[str]) -> list[str]:
        """Return a reply to each request; equal requests get different ones."""
        if not self._serves:
            await self._push(0)
            self._serves = True
        return list(await asyncio.gather(*(self._reply(request) for request in requests)))

    async def _reply(self, request: str) -> str:
        from llmrl.types import Message, Sampling

        self._asked += 1
        prompt_ids = self.chat.render([Message(role="user", content=request)])[-self.max_prompt :]
        sampling = Sampling(
            max_tokens=self.max_tokens,
            temperature=TEMPERATURE,
            stop_token_ids=self.chat.stop_token_ids,
            seed=self._seed * 1_000_003 + self._asked,
        )
        completion = await self.engine.generate(prompt_ids, sampling, session=f"attack-{self._asked}")
        return str(self.chat.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
