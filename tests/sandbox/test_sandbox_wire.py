"""Values between the verifier and the box: types are kept, hostile trees are refused."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from typing import Any

import pytest

from llmrl.sandbox import wire
from tests.sandbox.sandboxes import same


def through_wire(value: Any) -> Any:
    def tree_of_object(item: object) -> Any:
        return {"h": [7, type(item).__name__]}

    frame = wire.dump({"ok": wire.encode(value, tree_of_object)})
    return wire.decode(wire.load(frame[wire.HEADER.size :])["ok"], lambda number, name: f"handle {number} {name}")


VALUES = [
    None, True, False, 0, 1, -1, 2**53 + 1, 2**63, -(2**200), 0.0, -0.0, 1.0, 0.1, 1e300, math.nan, math.inf, -math.inf,
    "", "a", "\u00e9\ud800\0", b"", b"\xff\0", 1j, complex(math.inf, -0.5), [], (), set(), frozenset(), {}, [[]], [()],
    {1, "1"}, frozenset({(1, 2)}), {(1, 2): [3], "k": {None: b"x"}, 2: 2.0}, int, list,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))  # a set is written differently in each process
def test_a_plain_value_arrives_as_it_left(value: Any) -> None:
    assert same(through_wire(value), value)


def test_random_nested_values_arrive_as_they_left() -> None:
    draw = random.Random(int(os.environ.get("LLMRL_TEST_SEED", "0")))
    hashable = [value for value in VALUES if value.__hash__ is not None]

    def value(depth: int) -> Any:
        kind = draw.randrange(5) if depth else 4
        if kind == 0:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 1:
            return tuple(value(depth - 1) for _ in range(draw.randrange(4)))
        if kind == 2:
            return {draw.choice(hashable): value(depth - 1) for _ in range(draw.randrange(4))}
        return draw.choice(VALUES)

    for _ in range(300):
        item = value(4)
        # A NaN among the keys is a new object on the other side, which no key equals: compare the text then.
        assert same(through_wire(item), item) or repr(through_wire(item)) == repr(item)


def test_a_subclass_arrives_as_what_it_holds() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

        def __int__(self) -> int:
            return 39

    class Endless(list):
        def __iter__(self) -> Any:
            return iter(int, 1)

    assert same(through_wire([Liar(3), Endless([1])]), [3, [1]])
    assert through_wire(object()) == "handle 7 object"


def test_values_beyond_the_limits_are_refused_or_become_handles() -> None:
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    inner = through_wire(deep)
    for _ in range(wire.MAX_DEPTH):
        (inner,) = inner
    assert inner == "handle 7 list"
    shared = [1]
    for _ in range(60):
        shared = [shared, shared]
    with pytest.raises(wire.BadValue, match="parts"):
        through_wire(shared)


@pytest.mark.parametrize(
    "tree",
    [{"t": 7}, {"q": []}, {}, {"s": [[1]]}, {"d": [[1]]}, {"d": [[{"d": []}, 1]]}, {"i": "x"}, {"i": 3}, {"f": "1"},
     {"b": "x"}, {"c": [1]}, {"y": "type"}, {"y": []}, {"h": [1]}, {"h": "ab"}, {"a": 1, "b": 2}],
    ids=repr,
)  # fmt: skip
def test_a_tree_that_encode_never_writes_is_refused(tree: Any) -> None:
    with pytest.raises(wire.BadValue):
        wire.decode(tree, lambda number, name: None)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"ok":NaN}', b"\xff", b"[" * 200_000, b'{"a":' * 100_000, b"[" + b"[]," * 3_000_000]
)
def test_a_frame_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(wire.BadValue):
        wire.load(body)


def test_colliding_keys_are_refused_before_a_table_is_built() -> None:
    keys = [{"i": format(number * (2**61 - 1), "x")} for number in range(40_000)]
    started = time.process_time()
    wire.decode({"t": [{"i": format(2**100 + number, "x")} for number in range(40_000)]}, lambda number, name: None)
    as_tuple = time.process_time() - started
    for tree in ({"t": keys}, {"s": keys}, {"z": keys}, {"d": [[key, 1] for key in keys]}):
        started = time.process_time()
        with pytest.raises(wire.BadValue, match="collide"):
            wire.decode(tree, lambda number, name: None)
        # Building the table would compare each key with all before it: hundreds of times the work of a tuple.
        assert time.process_time() - started < 50 * as_tuple
    assert wire.decode({"s": list(range(10_000))}, lambda number, name: None) == set(range(10_000))


MODULUS = sys.hash_info.modulus


@pytest.mark.parametrize(
    "value",
    [
        [k * MODULUS + 1 for k in range(1, 2000)],
        [-k * MODULUS - 1 for k in range(1, 2000)],
        [[(k * MODULUS + 1,)] for k in range(1, 2000)],
        {k: (k + 1) * MODULUS + 7 for k in range(2000)},
    ],
    ids=["numbers", "below zero", "inside tuples", "values of a dict"],
)
def test_numbers_that_share_a_hash_are_refused(value: Any) -> None:
    with pytest.raises(wire.BadValue, match="chosen to collide"):
        through_wire(value)


def test_keys_that_share_a_hash_among_many_that_do_not_are_refused() -> None:
    keys = [*range(40_000), *(k * MODULUS + 1 for k in range(1, 100))]
    for tree in ({"s": keys}, {"d": [[key, 0] for key in keys]}, {"z": keys}):
        with pytest.raises(wire.BadValue, match="chosen to collide"):
            wire.decode(tree, lambda *_: None)


@pytest.mark.parametrize(
    "value",
    [
        [2**100] * 5000,
        [2**100 + k for k in range(5000)],
        [k * MODULUS + 1 for k in range(1, 60)],
        list(range(-5000, 5000)),
        [float(k) * 2.0**60 for k in range(3000)],
        {k: 3**k for k in range(500)},
    ],
)
def test_large_numbers_of_honest_programs_pass(value: Any) -> None:
    assert through_wire(value) == value
