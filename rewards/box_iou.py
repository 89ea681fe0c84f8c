"""Reward for grounding and detection: boxes in the completion's <answer> against the gold boxes of the row.
In: a completion, gold boxes in pixels of the original image and, if the model saw another size, both sizes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from llmrl.errors import UserError
from llmrl.types import Message, Score
from llmrl.verify.checks import boxes as bx
from llmrl.verify.checks.answers import completion_text, extract_tag
from llmrl.verify.thinking import without_thinking

Measure = Literal["iou", "map", "map50", "od_length"]
Space = Literal["original", "input", "thousand"]
_Sizes = tuple[tuple[float, float], tuple[float, float]] | None
"""(size the answer's coordinates refer to, size of the original image); None if they are the same."""


def box_iou(
    completion: str | list[Message],
    answer: Any = None,
    solution: Any = None,
    image_size: Any = None,
    input_size: Any = None,
    image_grid_thw: Any = None,
    prefilled: str = "",
    *,
    measure: Measure = "iou",
    coordinates: Space = "original",
    patch_size: int = 14,
) -> Score:
    """Score the boxes of an answer (VLM-R1, arXiv 2504.07615); 0 without a closed <answer>...</answer>.

    Args:
        completion: text, or messages (the last assistant message is read).
        answer: gold, always in pixels of the original image. For `iou` one box, else a list of {"bbox_2d", "label"};
            an empty list or the word None if the image has no such object.
        solution: gold, read if there is no `answer` (VLM-R1 rows).
        image_size: (width, height) of the original image; needed unless `coordinates` is "original".
        input_size: (width, height) the model saw, for `coordinates="input"`.
        image_grid_thw: the same as a grid of patches, read if there is no `input_size`.
        prefilled: how the prompt already begins the completion's message, such as `<think>`.
        measure: `iou` of the first box with the gold box; `map`, COCO mAP@[.5:.95]; `map50`, AP at 0.5; `od_length`,
            mAP times n_gold / n_predicted when more boxes are predicted than exist.
        coordinates: the unit of the model's answer: pixels of the original image, pixels of its input, or thousandths
            of the width and height.
        patch_size: pixels per patch of `image_grid_thw`.

    Raises:
        UserError: unknown measure, an invalid gold answer, or a missing size.
    """
    if measure not in ("iou", "map", "map50", "od_length"):
        raise UserError(f"measure {measure!r} is unknown: use iou, map, map50 or od_length")
    gold = answer if answer is not None else solution
    sizes = _sizes(coordinates, image_size, input_size, image_grid_thw, patch_size)
    extracted = extract_tag(without_thinking(prefilled + completion_text(completion)))
    if measure == "iou":
        return _score_one_box(extracted, bx.gold_box(gold), sizes)
    return _score_detections(extracted, bx.gold_detections(_without_tags(gold)), sizes, measure)


def check(row: dict[str, Any]) -> str | None:
    """Say that the gold boxes or a size cannot be read."""
    answer = row.get("answer")
    gold = answer if answer is not None else row.get("solution")
    if row.get("measure", "iou") == "iou":
        bx.gold_box(gold)
    else:
        bx.gold_detections(_without_tags(gold))
    image, model_input, grid = (row.get(column) for column in ("image_size", "input_size", "image_grid_thw"))
    _sizes(row.get("coordinates", "original"), image, model_input, grid, row.get("patch_size", 14))
    return None


def _score_one_box(extracted: str | None, gold: bx.Box, sizes: _Sizes) -> Score:
    box = bx.first_box(extracted or "")
    if box is None:
        return Score(reward=0.0, info={"reason": "no [x1, y1, x2, y2] in <answer>", "extracted": extracted})
    box = _to_original(box, sizes)
    return Score(reward=bx.box_iou(box, gold), info={"box": box, "gold": gold})


def _score_detections(extracted: str | None, gold: list[bx.Detection], sizes: _Sizes, measure: str) -> Score:
    found = None if extracted is None else bx.parse_detections(extracted)
    if found is None:
        return Score(reward=0.0, info={"reason": "neither a JSON list nor None in <answer>", "extracted": extracted})
    found = [replace(detection, box=_to_original(detection.box, sizes)) for detection in found]
    thresholds = (0.5,) if measure == "map50" else bx.COCO_THRESHOLDS
    precision = bx.mean_average_precision(found, gold, thresholds)
    factor = bx.length_factor(len(found), len(gold))
    reward = precision * factor if measure == "od_length" else precision
    return Score(
        reward=reward,
        parts={"average_precision": precision, "length_factor": factor},
        info={"num_predictions": len(found), "num_golds": len(gold)},
    )


def _sizes(coordinates: str, image_size: Any, input_size: Any, image_grid_thw: Any, patch_size: int) -> _Sizes:
    if coordinates == "original":
        return None
    if coordinates not in ("input", "thousand"):
        raise UserError(f"coordinates {coordinates!r} is unknown: use original, input or thousand")
    original = _size(image_size, "image_size", coordinates)
    if coordinates == "thousand":
        return (1000.0, 1000.0), original
    if input_size is None and image_grid_thw is not None:
        input_size = bx.grid_size(image_grid_thw, patch_size)
    return _size(input_size, "input_size (or image_grid_thw)", coordinates), original


def _size(value: Any, name: str, coordinates: str) -> tuple[float, float]:
    if value is None or len(value) != 2 or not (value[0] > 0 and value[1] > 0):
        raise UserError(f"{name} is {value!r}: coordinates={coordinates!r} needs it as (width, height) in pixels")
    return float(value[0]), float(value[1])


def _to_original(box: bx.Box, sizes: _Sizes) -> bx.Box:
    return box if sizes is None else bx.rescale_box(box, *sizes)


def _without_tags(gold: Any) -> Any:
    if not isinstance(gold, str):
        return gold
    inner = extract_tag(gold)
    return gold if inner is None else inner


_CAT = '{"bbox_2d": [0, 0, 10, 10], "label": "cat"}'
_DOG = '{"bbox_2d": [20, 20, 40, 40], "label": "dog"}'

EXAMPLES: list[dict[str, Any]] = [
    {"completion": "<think>t</think><answer>[0, 0, 10, 10]</answer>", "answer": [0, 0, 10, 10], "reward": 1.0},
    {
        "completion": "<answer>[0, 0, 10, 5]</answer>",
        "solution": '<answer>{"bbox": [0, 0, 10, 10]}</answer>',
        "reward": 0.5,
    },
    # The model saw 140 x 70 pixels of an image of 280 x 280, so x is doubled and y quadrupled.
    {
        "completion": "<answer>[0, 0, 70, 35]</answer>",
        "answer": [0, 0, 140, 140],
        "image_size": [280, 280],
        "image_grid_thw": [1, 5, 10],
        "coordinates": "input",
        "reward": 1.0,
    },
    {
        "completion": "<answer>[0, 0, 500, 500]</answer>",
        "answer": [0, 0, 100, 50],
        "image_size": [200, 100],
        "coordinates": "thousand",
        "reward": 1.0,
    },
    # Hostile: only in the thinking, outside the tags, many boxes, swapped corners, numbers beyond any image, no text.
    {"completion": "<think><answer>[0, 0, 10, 10]</answer>", "answer": [0, 0, 10, 10], "reward": 0.0},
    {"completion": "[0, 0, 10, 10]", "answer": [0, 0, 10, 10], "reward": 0.0},
    {"completion": "<answer>[50, 50, 60, 60] [0, 0, 10, 10]</answer>", "answer": [0, 0, 10, 10], "reward": 0.0},
    {"completion": "<answer>[10, 10, 0, 0]</answer>", "answer": [0, 0, 10, 10], "reward": 0.0},
    {"completion": "<answer>[0, 0, 1" + "0" * 400 + ", 10]</answer>", "answer": [0, 0, 10, 10], "reward": 0.0},
    {"completion": "", "answer": [0, 0, 10, 10], "reward": 0.0},
    {
        "completion": f"<answer>```json\n[{_CAT}, {_DOG}]\n```</answer>",
        "answer": f"<answer>[{_CAT}, {_DOG}]</answer>",
        "measure": "map",
        "reward": 1.0,
    },
    {"completion": "<answer>None</answer>", "answer": "None", "measure": "map", "reward": 1.0},
    {"completion": f"<answer>[{_CAT}]</answer>", "answer": "None", "measure": "map", "reward": 0.0},
    {"completion": f"<answer>[{_CAT}, {_CAT}]</answer>", "answer": f"[{_CAT}]", "measure": "map", "reward": 1.0},
    {"completion": f"<answer>[{_CAT}, {_CAT}]</answer>", "answer": f"[{_CAT}]", "measure": "od_length", "reward": 0.5},
    {"completion": f"<answer>[{_CAT}, {_DOG}]</answer>", "answer": f"[{_CAT}]", "measure": "od_length", "reward": 0.5},
    {"completion": "<answer>[[[[[[</answer>", "answer": f"[{_CAT}]", "measure": "map50", "reward": 0.0},
    {
        "completion": '<answer>[{"bbox_2d": [NaN, 0, 1, 1], "label": "cat"}]</answer>',
        "answer": f"[{_CAT}]",
        "measure": "map",
        "reward": 0.0,
    },
]
