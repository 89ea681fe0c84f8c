"""Agreement of replicas, on numbers set by hand."""

from __future__ import annotations

import pytest

from llmrl.engines.vllm.agreement import Agreement
from llmrl.errors import RunFailed
from llmrl.noise import Limit

SEQUENCES = [[1, 2, 3], [4, 5]]
NAN = float("nan")
LIMIT = Limit(mean=0.05, high=0.1)


def test_the_first_answer_is_remembered_and_the_others_are_near_it() -> None:
    agreement = Agreement(LIMIT)
    agreement.check(7, SEQUENCES, [("a", [[-1.0, -2.0], [-3.0]]), ("b", [[-1.05, -2.0], [-2.95]])])
    served = agreement.last
    assert served is not None and (served.version, served.logprobs.tolist()) == (7, [-1.0, -2.0, -3.0])
    agreement.check_one(served, [[-1.0, -2.09], [-3.0]])
    for wrong, gap in (([[-1.0, -2.0], [-3.3]], "0.1"), ([[-1.0, -2.0], [NAN]], "inf"), ([[-1.0], [-3.0]], "inf")):
        with pytest.raises(RunFailed, match=rf"version 7 .* by {gap} nats on average"):
            agreement.check_one(served, wrong)


def test_the_odd_one_is_named_and_nothing_is_remembered() -> None:
    agreement = Agreement(LIMIT)
    agreement.check(7, SEQUENCES, [("a", [[-1.0, -2.0], [-3.0]])])
    with pytest.raises(RunFailed) as refused:
        rows = [[-1.0, -2.0], [-5.0]]
        agreement.check(8, SEQUENCES, [("a", rows), ("b", [[-1.0, -2.0], [-3.0]]), ("c", rows)])
    _, a, b, c = str(refused.value).split("\n  ")
    assert a == c.replace("c:", "a:") == "a: 0 to 0.667 nats from the others on average"
    odd = "b: 0.667 to 0.667 nats from the others on average"
    assert b == f"{odd}, and the same as before the push: the push did not arrive there"
    assert agreement.last is not None and agreement.last.version == 7


def test_what_one_replica_alone_gives_is_for_the_receipt_to_judge() -> None:
    Agreement(LIMIT).check(0, SEQUENCES, [("a", [[NAN, -2.0], [-3.0]])])
