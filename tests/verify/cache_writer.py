"""The program of each process in the cache test; a module of its own, because a new process then imports little."""

from __future__ import annotations

from llmrl.verify.judge.cache import ReplyCache, SpendLedger, Spent


def write_and_read(folder: str, worker: int) -> None:
    cache, ledger = ReplyCache(folder), SpendLedger(f"{folder}/ledger.jsonl", budget_tokens=None, budget_cost=None)
    for i in range(50):
        cache.put(f"{i % 5:064d}", f"{i % 5}" * 20_000)
        found = cache.get(f"{(i + worker) % 5:064d}")
        # By the sixth turn this process has written every key itself: a reader must never see less than a whole reply.
        assert (found is None and i < 5) or (found is not None and len(set(found)) == 1 and len(found) == 20_000)
        ledger.record(Spent(calls=1, input_tokens=worker, output_tokens=1, cost=0.5))
