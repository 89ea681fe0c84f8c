"""The vllm_server engine against scripted servers: faults, pushes, adapters, NCCL, and what is refused."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from llmrl.engines.vllm.delivery import NcclDelivery, SharedMemoryDelivery
from llmrl.engines.vllm.servers import VllmServerEngine
from llmrl.errors import RunFailed, UserError
from llmrl.types import Adapter, Sampling
from tests.engines.vllm.fake_vllm import ROUTES, FakeVllm, assert_each_answered_once, draw, engine_on, nothing

pytestmark = pytest.mark.slow


@pytest.fixture
def servers() -> Iterator[list[FakeVllm]]:
    fakes = [FakeVllm(latency=0.05), FakeVllm(latency=0.05)]
    yield fakes
    for fake in fakes:
        fake.close()


def test_requests_name_every_sampling_parameter(servers: list[FakeVllm]) -> None:
    """A server would fill in missing ones from the model's generation_config."""

    async def main() -> None:
        engine, _, _ = engine_on(servers[:1])
        await engine.load_weights(nothing, version=0)
        await engine.generate([1, 2], Sampling(max_tokens=2, seed=9, stop_token_ids=(4,)), session="s")
        wanted = {
            "prompt": [1, 2], "max_tokens": 2, "seed": 9, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [4],
            "ignore_eos": True, "logprobs": 0, "return_token_ids": True, "model": "tiny",
        }  # fmt: skip
        assert servers[0].answered == [wanted]
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["kill", "hang", "500"])
def test_no_rollout_is_lost_with_a_server(servers: list[FakeVllm], fault: str) -> None:
    async def main() -> None:
        engine, _, said = engine_on(servers, slack=0)
        await engine.load_weights(nothing, version=3)
        servers[0].fault = "stuck"
        batch = asyncio.ensure_future(draw(engine, 40))
        while len(servers[1].answered) < 20:
            await asyncio.sleep(0.01)
        if fault == "kill":
            servers[0].kill()
        else:
            engine.replicas.slots[0].replica.health_timeout_s = 0.5 if fault == "hang" else 120
            servers[0].fault = fault
        if fault == "500":
            servers[0].released.set()
        assert_each_answered_once(await batch, 3)
        assert engine.replicas.num_moved > 0
        assert (fault == "500") == (len(engine.replicas.live) == 2), "a healthy server is kept"
        assert fault == "500" or servers[0].url in said[0]
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("pushed_meanwhile", [False, True])
def test_a_restarted_server_gets_the_current_weights_before_it_serves(
    servers: list[FakeVllm], pushed_meanwhile: bool
) -> None:
    async def main() -> None:
        engine, delivery, said = engine_on(servers, slack=0)
        await engine.load_weights(nothing, version=0)
        await engine.logprobs([[1, 2, 3]])
        servers[0].kill()
        assert_each_answered_once(await draw(engine, 10), 0)
        version = 0
        if pushed_meanwhile:
            version = 1
            await engine.load_weights(nothing, version=1)
            assert await engine.logprobs([[1, 2, 3]]) == [[-2.0, -2.0]]
        before = len(servers[0].answered)
        servers[0].start()
        while len(engine.replicas.live) < 2:
            await asyncio.sleep(0.02)
        assert servers[0].label == engine.label and servers[0].weights == delivery.number
        assert servers[0].log[-4:] == ["/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
        assert len(servers[0].answered) == before
        assert_each_answered_once(await draw(engine, 10), version)
        assert len(servers[0].answered) > before
        assert said[-1].startswith(f"{servers[0].url} is back and up to date")
        await engine.close()

    asyncio.run(main())


def test_a_server_that_was_restarted_unseen_serves_nothing_before_it_is_up_to_date(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, delivery, _ = engine_on(servers[:1])
        await engine.load_weights(nothing, version=0)
        servers[0].kill()
        servers[0].start()
        engine.replicas.slots[0].checked_at = -math.inf  # a restart takes longer than a check stays fresh
        assert_each_answered_once(await draw(engine, 4), 0)
        assert servers[0].weights == delivery.number, "not those from disk"
        await engine.close()

    asyncio.run(main())


def test_a_replica_that_cannot_prove_the_weights_stays_out(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, delivery, said = engine_on(servers)
        await engine.load_weights(nothing, version=0)
        await engine.logprobs([[1, 2, 3]])
        servers[0].kill()
        await draw(engine, 4)
        delivery.misses = {servers[0].url}
        servers[0].start()
        while len(said) < 2:
            await asyncio.sleep(0.02)
        assert "answers again but cannot be used" in said[1] and "by 1 nats on average" in said[1]
        assert [server.name for server in engine.replicas.live] == [servers[1].url]
        await engine.close()

    asyncio.run(main())


def test_a_push_that_misses_one_replica_is_named(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, delivery, _ = engine_on(servers)
        for version in (0, 1):
            await engine.load_weights(nothing, version=version)
            await engine.logprobs([[1, 2, 3]])
        delivery.misses = {servers[1].url}
        await engine.load_weights(nothing, version=2)
        with pytest.raises(RunFailed, match=rf"{servers[1].url}: .* as before the push: the push did not arrive there"):
            await engine.logprobs([[1, 2, 3]])
        await engine.close()

    asyncio.run(main())


def test_a_server_lost_during_a_push_gets_the_weights_when_it_returns(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, delivery, _ = engine_on(servers)
        await engine.load_weights(nothing, version=0)
        servers[1].fault = "hang"
        engine.replicas.slots[1].replica.request_timeout_s = 0.3
        await engine.load_weights(nothing, version=1)
        engine.replicas.slots[1].replica.request_timeout_s = 120
        assert [server.name for server in engine.replicas.live] == [servers[0].url]
        servers[1].fault = ""
        servers[1].released.set()
        while len(engine.replicas.live) < 2:
            await asyncio.sleep(0.02)
        servers[1].released.clear()
        assert servers[1].weights == delivery.number == 2 and servers[1].label == engine.label
        await engine.close()

    asyncio.run(main())


def test_two_runs_on_the_same_servers_are_distinguished(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        ours, _, said = engine_on(servers[:1])
        theirs, _, _ = engine_on(servers[:1])
        await ours.load_weights(nothing, version=5)
        await theirs.load_weights(nothing, version=5)
        ours.replicas.slots[0].checked_at = -math.inf
        await draw(ours, 1)
        assert "serves weights 'llmrl-" in said[0], "version 5 of another run is not our version 5"
        assert "another run pushes to it" in said[0]
        with pytest.raises(RunFailed, match=r"got weights of another run \(llmrl-\w+\) 3 times: two runs share it"):
            for version in range(6, 20):
                await theirs.load_weights(nothing, version=version)
                ours.replicas.slots[0].checked_at = -math.inf
                await draw(ours, 1)
        await ours.close()
        await theirs.close()

    asyncio.run(main())


def test_a_process_that_does_not_push_takes_what_arrived_for_the_current_version(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        first, _, _ = engine_on(servers)
        other, _, said = engine_on(servers, is_sender=False)
        await first.load_weights(nothing, version=0)
        await other.load_weights(nothing, version=0)
        assert other.label == first.label
        assert_each_answered_once(await draw(other, 4), 0)
        await first.load_weights(nothing, version=1)  # the other process does not know yet
        for slot in other.replicas.slots:
            slot.checked_at = -math.inf
        assert len(await draw(other, 4)) == 4 and not said
        await other.load_weights(nothing, version=1)
        servers[0].kill()
        assert_each_answered_once(await draw(other, 4), 1)
        servers[0].start()
        first.replicas.lost(first.replicas.slots[0].replica, "as its next request would find out")
        while len(other.replicas.live) < 2:
            await asyncio.sleep(0.02)
        assert servers[0].label == first.label, "the first process brought it up to date, and the other waited for that"
        await first.close()
        await other.close()

    asyncio.run(main())


def test_aborted_requests_are_drawn_again(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, _, _ = engine_on(servers[:1], on_update="abort")
        await engine.load_weights(nothing, version=0)
        servers[0].fault = "abort"
        batch = asyncio.ensure_future(draw(engine, 4))
        while len(servers[0].answered) < 4:
            await asyncio.sleep(0.01)
        servers[0].fault = ""
        assert {completion.finish for completion in await batch} == {"length"}
        assert len(servers[0].answered) > 4
        assert servers[0].log[0] == "/pause?mode=abort"
        await engine.close()

    asyncio.run(main())


# --- adapters, and GPUs -----------------------------------------------------------------------------------------------


def test_an_adapter_has_a_new_name_per_version_and_survives_a_restart(servers: list[FakeVllm]) -> None:
    """A fake server's log-probs are minus its adapter's number: version v brings adapter v + 1."""

    async def main() -> None:
        engine, _, _ = engine_on(servers, takes_adapters=True, slack=0)
        adapter = Adapter(config={"r": 4}, tensors={"a": torch.zeros(2)})
        for version in range(7):
            await engine.load_adapter(adapter, version=version)
            assert await engine.logprobs([[1, 2, 3]]) == [[-version - 1.0] * 2]
        drawn = await draw(engine, 8)
        assert_each_answered_once(drawn, 6)
        assert {tuple(completion.version_spans) for completion in drawn} == {((6, 2),)}
        assert len(servers[0].adapters) < 7, "old ones are removed"
        assert not any(
            route.startswith(("/pause", "/update")) for route in servers[0].log[1:] if "version" not in route
        )
        servers[0].kill()
        servers[0].start()
        while servers[0].label != engine.label:
            engine.replicas.slots[0].checked_at = -math.inf
            assert_each_answered_once(await draw(engine, 4), 6)
            await asyncio.sleep(0.05)
        assert sorted(servers[0].adapters.values()) == [0, 7], "only the base and the current one"
        await engine.close()

    asyncio.run(main())


def test_nccl_joins_all_workers_sends_while_they_receive_and_joins_anew_after_a_loss(servers: list[FakeVllm]) -> None:
    servers[0].world_size, servers[1].world_size = 2, 4
    groups: list[int] = []

    def open_group(host: str, port: int, world_size: int) -> int:
        groups.append(world_size)
        return world_size

    def broadcast(group: int, tensors: list[tuple[str, torch.Tensor]]) -> None:
        live = [fake for fake in servers if not fake.released.is_set()]
        deadline = time.monotonic() + 120
        while any(fake.log.count("/update_weights") <= sent[0] for fake in live):
            assert time.monotonic() < deadline, "a server was not asked to receive while this end sends"
            time.sleep(0.01)
        assert group == 1 + sum(fake.world_size for fake in live)
        assert [(name, tensor.tolist()) for name, tensor in tensors] == [("w", [1.0, 2.0])]

    sent = [0]

    async def main() -> None:
        delivery = NcclDelivery(host="trainer", open_group=open_group, broadcast=broadcast)
        engine, _, _ = engine_on(servers, delivery=delivery)
        weights = torch.tensor([1.0, 2.0])
        for version in (0, 1):
            await engine.load_weights(lambda: [("w", weights)], version=version)
            sent[0] += 1
        assert groups == [7], "joined once"
        first, second = (fake.sent["/init_weight_transfer_engine"]["init_info"] for fake in servers)
        assert (first["rank_offset"], second["rank_offset"], first["world_size"]) == (1, 3, 7)
        assert first["master_address"] == "trainer" and first["master_port"] == second["master_port"]
        wanted = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]]}
        assert servers[1].sent["/update_weights"]["update_info"] == wanted
        assert {fake.label for fake in servers} == {engine.label}
        weights.zero_()  # the learner continues, and the staged copy does not change
        servers[1].kill()
        await draw(engine, 6)
        weights.copy_(torch.tensor([1.0, 2.0]))
        await engine.load_weights(lambda: [("w", weights)], version=2)
        assert groups == [7, 3], "without the ranks of the server that died"
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("route", ["/update_weights", "/init_weight_transfer_engine"])
def test_a_process_whose_transfer_fails_ends_although_its_own_end_waits_for_ever(
    servers: list[FakeVllm], route: str
) -> None:
    def for_ever(*_: Any) -> None:
        threading.Event().wait()

    open_group = for_ever if route == "/init_weight_transfer_engine" else (lambda *_: 1)

    async def main() -> None:
        engine, _, _ = engine_on(servers, delivery=NcclDelivery(open_group=open_group, broadcast=for_ever))
        servers[1].refuses = route
        with pytest.raises((RunFailed, UserError), match=r"did not take the weights|cannot receive weights"):
            await engine.load_weights(lambda: [("w", torch.zeros(2))], version=0)
        await engine.close()

    asyncio.run(main())  # returns only if nothing keeps the loop's threads


def test_the_error_names_the_flag_that_a_server_without_a_weight_backend_needs(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        for delivery, flag in (
            (SharedMemoryDelivery(), "llmrl_shared_memory"),
            (NcclDelivery(open_group=lambda *_: None), '"backend": "nccl"'),
        ):
            engine, _, _ = engine_on(servers[:1], delivery=delivery)
            servers[0].refuses = "/init_weight_transfer_engine"
            with pytest.raises(UserError, match=rf"cannot receive weights .*--weight-transfer-config .*{flag}"):
                await engine.load_weights(lambda: [("w", torch.zeros(2))], version=0)
            await engine.close()

    asyncio.run(main())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_request_that_every_server_refuses_takes_no_server_out(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, _, _ = engine_on(servers)
        await engine.load_weights(nothing, version=0)
        servers[0].fault = servers[1].fault = "400"
        with pytest.raises(RunFailed, match="answered 400 to POST /v1/completions: scripted 400"):
            await draw(engine, 1)
        assert len(engine.replicas.live) == 2
        with pytest.raises(UserError, match=r"make 66, but the servers were started with --max-model-len 64"):
            await engine.generate([1] * 60, Sampling(max_tokens=6), session="s")
        servers[0].fault = servers[1].fault = "nan"
        with pytest.raises(RunFailed, match="not finite.*the weights are broken"):
            await draw(engine, 1)
        await engine.close()

    asyncio.run(main())


def test_the_error_names_what_a_server_without_weight_routes_needs() -> None:
    fake = FakeVllm(routes=tuple(route for route in ROUTES if route.startswith("/v1") or route == "/health"))

    async def main() -> None:
        engine, _, _ = engine_on([fake])
        with pytest.raises(UserError, match=r"has no /pause, .*/weight_info: start it with VLLM_SERVER_DEV_MODE=1"):
            await engine.load_weights(nothing, version=0)
        await engine.close()

    asyncio.run(main())
    fake.close()


def test_log_probabilities_that_ignore_the_temperature_are_refused(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        engine, _, _ = engine_on(servers)
        await engine.load_weights(nothing, version=0)
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            await engine.generate([1], Sampling(max_tokens=1, temperature=0.7), session="s")
        await engine.close()

    asyncio.run(main())


def test_servers_that_are_not_there_or_differ_are_user_errors(servers: list[FakeVllm]) -> None:
    async def main() -> None:
        servers[1].model = "another"
        engine, _, _ = engine_on(servers)
        with pytest.raises(UserError, match=r"serve different models: \['another', 'tiny'\]"):
            await engine.load_weights(nothing, version=0)
        await engine.close()
        servers[1].kill()
        engine, _, _ = engine_on(servers, start_timeout_s=0.2)
        with pytest.raises(UserError, match=rf"no vLLM server answers at {servers[1].url} .*llmrl serve"):
            await engine.load_weights(nothing, version=0)
        await engine.close()

    asyncio.run(main())
    with pytest.raises(UserError, match=r"rollout\.server\.urls"):
        VllmServerEngine([])
