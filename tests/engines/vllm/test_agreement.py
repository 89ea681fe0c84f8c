"""Agreement of replicas, on numbers set by hand."""

from __future__ import annotations

import pytest

from llmrl.engines.vllm.agreement import Agreement
from llmrl.errors import RunFailed

SEQUENCES = [[1, 2, 3], [4, 5]]
NAN = float("nan")


def test_the_first_answer_is_remembered_and_the_others_are_near_it() -> None:
    agreement = Agreement(0.1)
    agreement.check(7, SEQUENCES, [("a", [[-1.0, -2.0], [-3.0]]), ("b", [[-1.05, -2.0], [-2.95]])])
    served = agreement.last
    assert served is not None and (served.version, served.logprobs.tolist()) == (7, [-1.0, -2.0, -3.0])
    agreement.check_one(served, [[-1.0, -2.09], [-3.0]])
    for wrong, gap in (([[-1.0, -2.0], [-3.2]], "0.2"), ([[-1.0, -2.0], [NAN]], "inf"), ([[-1.0], [-3.0]], "inf")):
        with pytest.raises(RunFailed, match=rf"version 7 .* {gap} nats away"):
            agreement.check_one(served, wrong)


def test_the_odd_one_is_named_and_nothing_is_remembered() -> None:
    agreement = Agreement(0.1)
    agreement.check(7, SEQUENCES, [("a", [[-1.0, -2.0], [-3.0]])])
    with pytest.raises(RunFailed) as refused:
        rows = [[-1.0, -2.0], [-5.0]]
        agreement.check(8, SEQUENCES, [("a", rows), ("b", [[-1.0, -2.0], [-3.0]]), ("c", rows)])
    _, a, b, c = str(refused.value).split("\n  ")
    assert a == c.replace("c:", "a:") == "a: 0 to 2 nats from the others"
    assert b == "b: 2 to 2 nats from the others, and the same as before the push: the push did not arrive there"
    assert agreement.last is not None and agreement.last.version == 7


def test_what_one_replica_alone_gives_is_for_the_receipt_to_judge() -> None:
    Agreement(0.1).check(0, SEQUENCES, [("a", [[NAN, -2.0], [-3.0]])])
