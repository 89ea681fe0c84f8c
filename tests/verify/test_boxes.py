"""Boxes in answers: hand-computed IoU and mAP, pycocotools and brute force as oracles, sizes, hostile text."""

from __future__ import annotations

import contextlib
import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.errors import UserError
from llmrl.verify.checks import boxes as bx
from llmrl.verify.checks.boxes import Box, Detection
from rewards.box_iou import EXAMPLES, box_iou
from tests.verify.texts import HUGE, assert_linear, repeated, texts

FRAGMENTS = [
    "[",
    "]",
    "1, 2, 3, 4",
    "[0, 0, 5, 5]",
    '[{"bbox_2d": [0, 0, 9, 9], "label": "a"}]',
    "{",
    "NaN",
    "None",
    "```json",
]


# --- IoU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (2, 2, 4, 4), 0.04),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (9, 0, 19, 10), 10 / 190),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),
        ((0, 0, 0, 10), (0, 0, 10, 10), 0.0),
        ((-5, -5, 5, 5), (0, 0, 5, 5), 0.25),
    ],
)
def test_iou_by_hand(a: Box, b: Box, expected: float) -> None:
    assert bx.box_iou(a, b) == bx.box_iou(b, a) == pytest.approx(expected)


corners = st.tuples(*[st.integers(-8, 8)] * 4)


@given(corners, corners)
def test_iou_counts_unit_squares(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def squares(box: tuple[int, ...]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    union = squares(a) | squares(b)
    # A box without an inside overlaps nothing, not even a box around it.
    expected = Fraction(len(squares(a) & squares(b)), len(union)) if squares(a) and squares(b) else 0
    assert bx.box_iou(a, b) == pytest.approx(float(expected))  # type: ignore[arg-type]


def test_iou_of_extreme_numbers_is_finite() -> None:
    assert bx.box_iou((-1e308, -1e308, 1e308, 1e308), (0, 0, 1, 1)) == 0.0


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_rescaling_uses_each_axis_own_factor_and_undoes_itself() -> None:
    box = (10.0, 20.0, 30.0, 40.0)
    there = bx.rescale_box(box, (100, 200), (300, 100))
    assert there == pytest.approx((30.0, 10.0, 90.0, 20.0))
    assert bx.rescale_box(there, (300, 100), (100, 200)) == pytest.approx(box)


def test_grid_is_time_height_width() -> None:
    assert bx.grid_size([1, 5, 10]) == (140, 70)
    assert bx.grid_size(np.array([[1, 5, 10], [1, 9, 9]])) == (140, 70)
    assert bx.grid_size([1, 5, 10], patch_size=16) == (160, 80)


def test_a_resized_image_gives_the_reward_of_the_original() -> None:
    gold = [12, 30, 200, 90]
    seen = bx.rescale_box((12, 30, 200, 90), (400, 300), (280, 140))
    columns: dict[str, Any] = {"answer": gold, "image_size": [400, 300], "coordinates": "input"}
    text = f"<answer>{[round(x, 6) for x in seen]}</answer>"
    assert box_iou(text, image_grid_thw=[[1, 10, 20]], **columns).reward == pytest.approx(1.0)
    assert box_iou(text, input_size=(280, 140), **columns).reward == pytest.approx(1.0)
    assert box_iou(text, input_size=(140, 280), **columns).reward < 0.5
    with pytest.raises(UserError, match="input_size"):
        box_iou(text, **columns)
    with pytest.raises(UserError, match="image_size"):
        box_iou(text, answer=gold, coordinates="thousand")


# --- mAP --------------------------------------------------------------------------------------------------------------

CAT, CAT2, DOG = (
    Detection((0, 0, 10, 10), "cat"),
    Detection((50, 50, 60, 60), "cat"),
    Detection((20, 20, 40, 40), "dog"),
)


@pytest.mark.parametrize(
    ("predictions", "golds", "expected"),
    [
        ([], [], 1.0),
        ([CAT], [], 0.0),
        ([], [CAT], 0.0),
        ([CAT, DOG], [CAT, DOG], 1.0),
        # One of two labels found.
        ([CAT], [CAT, DOG], 0.5),
        # One of two boxes: precision 1 at the recall points 0 .. 0.50, which are 51 of 101.
        ([CAT], [CAT, CAT2], 51 / 101),
        # A miss first: precision 1/2 at every recall point.
        ([CAT2, CAT], [CAT], 0.5),
        # The miss last costs nothing at equal confidence: full recall is reached before it.
        ([CAT, CAT2], [CAT], 1.0),
        # A label that no gold box has is ignored.
        ([DOG, CAT], [CAT], 1.0),
        # The second of two equal predictions finds its gold box already taken.
        ([CAT, CAT], [CAT, CAT2], 51 / 101),
        # IoU 0.8 passes the thresholds 0.50 .. 0.80: seven of ten.
        ([Detection((0, 0, 10, 8), "cat")], [CAT], 0.7),
    ],
)
def test_map_by_hand(predictions: list[Detection], golds: list[Detection], expected: float) -> None:
    assert bx.mean_average_precision(predictions, golds) == pytest.approx(expected)


def test_among_equal_overlaps_the_last_gold_box_is_taken() -> None:
    golds = [Detection((0, 0, 10, 8), "cat"), Detection((0, 2, 10, 10), "cat")]
    predictions = [CAT, golds[0]]
    # CAT overlaps both by 0.8 and takes the second, which leaves the first to its exact copy: AP 1 at 0.50 .. 0.80.
    # Above that CAT misses: precision 1/2 at half the recall.
    assert bx.mean_average_precision(predictions, golds) == pytest.approx((7 + 3 * 51 / 202) / 10)


def test_length_factor() -> None:
    assert [bx.length_factor(n, 2) for n in (0, 1, 2, 3, 4, 8)] == [1, 1, 1, 2 / 3, 0.5, 0.25]
    assert bx.length_factor(0, 0) == 1.0


def random_scene(rng: np.random.Generator) -> tuple[list[Detection], list[Detection]]:
    """Gold boxes, and predictions that are jittered copies of them, strays and repetitions."""

    def draw(label: str) -> Detection:
        x, y, w, h = rng.integers(0, 60), rng.integers(0, 60), rng.integers(5, 40), rng.integers(5, 40)
        return Detection((float(x), float(y), float(x + w), float(y + h)), label)

    golds = [draw(str(rng.choice(["a", "b", "c"]))) for _ in range(rng.integers(1, 7))]
    predictions = []
    for _ in range(rng.integers(0, 12)):
        if rng.random() < 0.7:
            gold = golds[rng.integers(len(golds))]
            jitter = rng.integers(-3, 4, size=4)
            predictions.append(
                Detection(tuple(float(x + j) for x, j in zip(gold.box, jitter, strict=True)), gold.label)
            )  # type: ignore[arg-type]
        else:
            predictions.append(draw(str(rng.choice(["a", "b", "z"]))))
    return predictions, golds


def brute_force_map(predictions: list[Detection], golds: list[Detection]) -> float:
    """Compute mAP from its definition, in exact fractions, without arrays or search."""
    if not predictions or not golds:
        return float(not predictions and not golds)
    values = []
    for label in {gold.label for gold in golds}:
        for step in range(10):
            threshold = 0.5 + 0.05 * step
            free = [gold for gold in golds if gold.label == label]
            count, hits, curve = len(free), 0, []
            for i, prediction in enumerate((p for p in predictions if p.label == label), 1):
                overlaps = [bx.box_iou(prediction.box, gold.box) for gold in free]
                if overlaps and max(overlaps) >= threshold - 1e-12:
                    free.pop(len(overlaps) - 1 - overlaps[::-1].index(max(overlaps)))
                    hits += 1
                curve.append((Fraction(hits, count), Fraction(hits, i)))
            points = [Fraction(k, 100) for k in range(101)]
            values.append(sum(max((p for r, p in curve if r >= point), default=Fraction(0)) for point in points) / 101)
    return float(sum(values) / len(values))


def test_map_agrees_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(25):
        predictions, golds = random_scene(rng)
        assert bx.mean_average_precision(predictions, golds) == pytest.approx(
            brute_force_map(predictions, golds), abs=1e-9
        )


def coco_map(predictions: list[Detection], golds: list[Detection]) -> float:
    """Compute mAP with pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = {label: i for i, label in enumerate(dict.fromkeys(gold.label for gold in golds), 1)}

    def entry(i: int, detection: Detection) -> dict[str, Any]:
        x1, y1, x2, y2 = detection.box
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
        return {"id": i, "image_id": 1, "category_id": labels[detection.label], **box}

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 1}],
            "categories": [{"id": i} for i in labels.values()],
            "annotations": [entry(i, gold) for i, gold in enumerate(golds, 1)],
            "info": {},
        }
        truth.createIndex()
        known = [p for p in predictions if p.label in labels]
        if not known:
            return 0.0
        found = truth.loadRes([{**entry(i, p), "score": 1.0} for i, p in enumerate(known, 1)])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def test_map_agrees_with_pycocotools(seed: int) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (an optional oracle)")
    rng = np.random.default_rng(seed)
    for _ in range(60):
        predictions, golds = random_scene(rng)
        # pycocotools gives boxes without an inside an area; ours overlap nothing.
        predictions = [p for p in predictions if bx.area(p.box) > 0]
        assert bx.mean_average_precision(predictions, golds) == pytest.approx(coco_map(predictions, golds), abs=1e-9)


def test_only_a_hundred_predictions_of_a_label_count() -> None:
    strays = [Detection((500.0 + i, 0, 501.0 + i, 1), "cat") for i in range(100)]
    assert bx.mean_average_precision([*strays, CAT], [CAT]) == 0.0
    assert bx.mean_average_precision([*strays[1:], CAT], [CAT]) == pytest.approx(0.01)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("box: [ 1.5,2 , -3,4 ] [5, 6, 7, 8]", (1.5, 2, -3, 4)),
        ('{"bbox_2d": [1, 2, 3, 4]}', (1, 2, 3, 4)),
        ("[[1, 2, 3, 4]]", (1, 2, 3, 4)),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("(1, 2, 3, 4)", None),
        ("[1e9, 2, 3, 4]", None),
        ("[a, b, c, d]", None),
        ("[12345678901, 2, 3, 4]", None),
    ],
)
def test_first_box(text: str, expected: Box | None) -> None:
    assert bx.first_box(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('```json\n[{"bbox_2d": [0, 0, 10, 10], "label": " Cat "}]\n```', [CAT]),
        ('I see [1] thing: [{"bbox": [0, 0, 10, 10], "label": "cat"}] there', [CAT]),
        ("None", []),
        (" `none`. ", []),
        ("[]", []),
        ('[{"bbox_2d": [0, 0, 10], "label": "cat"}, {"bbox_2d": [0, 0, 10, 10], "label": "cat"}]', [CAT]),
        ('[{"bbox_2d": [0, 0, 10, true], "label": "cat"}]', []),
        ('[{"bbox_2d": [0, 0, 10, 10], "label": 3}]', []),
        ('[{"bbox_2d": [0, 0, 10, 1e400], "label": "cat"}]', []),
        ("no boxes", None),
        ('[{"bbox_2d": [0, 0,', None),
        ("[" * 100_000 + "{", None),
        ('[{"a":' * 100_000, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_parse_detections(text: str, expected: list[Detection] | None) -> None:
    assert bx.parse_detections(text) == expected


@pytest.mark.parametrize("gold", [None, "cat", [1, 2, 3], [5, 5, 1, 1], {"box": 1}, [float("nan"), 0, 1, 1]])
def test_a_gold_answer_without_a_box_is_an_error(gold: Any) -> None:
    with pytest.raises(UserError, match="gold answer"):
        box_iou("<answer>[0, 0, 1, 1]</answer>", answer=gold)


@pytest.mark.parametrize("gold", [None, "cat", [[0, 0, 1, 1]], '[{"bbox_2d": [0, 0, 0, 0], "label": "cat"}]'])
def test_invalid_gold_detections_are_an_error(gold: Any) -> None:
    with pytest.raises(UserError, match="gold answer"):
        box_iou("<answer>None</answer>", answer=gold, measure="map")


def test_gold_boxes_of_every_row_format() -> None:
    for gold in (
        [1, 2, 3, 4],
        (1, 2, 3, 4),
        np.array([1, 2, 3, 4]),
        {"bbox_2d": [1, 2, 3, 4]},
        '{"bbox": [1, 2, 3, 4]}',
    ):
        assert bx.gold_box(gold) == (1, 2, 3, 4)
    entries = [{"bbox_2d": np.array([0, 0, 10, 10]), "label": "Cat"}]
    assert bx.gold_detections(entries) == bx.gold_detections(np.array(entries)) == [CAT]
    assert bx.gold_detections("None") == bx.gold_detections([]) == []


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda e: repr(e["completion"])[:40])
def test_examples(case: dict[str, Any]) -> None:
    columns = {k: v for k, v in case.items() if k != "reward"}
    assert box_iou(**columns).reward == pytest.approx(case["reward"])


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UserError, match="measure 'giou'"):
        box_iou("", [0, 0, 1, 1], measure="giou")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="coordinates 'percent'"):
        box_iou("", [0, 0, 1, 1], coordinates="percent")  # type: ignore[arg-type]


@given(texts([*FRAGMENTS, "<answer>", "</answer>"]))
def test_any_text_scores_within_range(text: str) -> None:
    gold = '[{"bbox_2d": [0, 0, 9, 9], "label": "a"}]'
    for wrapped in (text, f"<answer>{text}</answer>"):
        assert 0.0 <= box_iou(wrapped, [0, 0, 5, 5]).reward <= 1.0
        for measure in ("map", "map50", "od_length"):
            assert 0.0 <= box_iou(wrapped, gold, measure=measure).reward <= 1.0
    assert all(isinstance(d, Detection) and len(d.box) == 4 for d in bx.parse_detections(text) or [])


@pytest.mark.parametrize(
    "pattern", ["[", "[1", "[1,", "[1, 2, 3, 4, ", "[ ", "[{", "1", '[{"a": [', "[0, 0, 1, 1]", "\ud800", "\0"]
)
def test_long_texts_take_linear_time(pattern: str) -> None:
    assert_linear(bx.first_box, pattern)
    assert_linear(bx.parse_detections, pattern)


def test_ten_megabytes_are_scored() -> None:
    text = repeated("[1, 2, [{\ud800\0", HUGE)
    assert box_iou(f"<answer>{text}[0, 0, 1, 1]</answer>", [0, 0, 1, 1]).reward == 1.0
    assert box_iou(f"<answer>{text}</answer>", "None", measure="map").reward == 0.0
