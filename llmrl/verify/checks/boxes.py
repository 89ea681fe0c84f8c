"""Bounding boxes in answers: text in; boxes, intersection over union, COCO mAP and its length-penalized form out.

A box is (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2. Any other four numbers overlap nothing.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.errors import UserError

Box = tuple[float, float, float, float]

MAX_DETECTIONS = 100
"""Largest number of detections per label that COCO evaluates."""
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
_RECALL_POINTS = np.linspace(0.0, 1.0, 101)
# With possessive quantifiers a failed match never backtracks, so the search stays linear.
_NUMBER = r"\s*+(-?[0-9]{1,9}+(?:\.[0-9]{1,9}+)?+)\s*+"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_LIST_START = re.compile(r"\[(?=\s*+[{\]])")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Detection:
    """One labeled box."""

    box: Box
    label: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def first_box(text: str) -> Box | None:
    """Return the first [x1, y1, x2, y2] in the text, or None. Only the first counts, so listing many gains nothing."""
    match = _BOX.search(text)
    return tuple(float(number) for number in match.groups()) if match else None  # type: ignore[return-value]


def parse_detections(text: str) -> list[Detection] | None:
    """Read an open-vocabulary detection answer: a JSON list of {"bbox_2d": [x1, y1, x2, y2], "label": "..."}.

    The list may be in a ```json fence; text before and after it is ignored. The word None (or []) is the empty list.
    Entries without a valid box are left out.

    Returns:
        The detections, or None if the answer is neither a list nor the word None.
    """
    entries = _json_list(text)
    if entries is None:
        return None
    return [detection for entry in entries if (detection := _detection(entry)) is not None]


def _json_list(text: str) -> list[Any] | None:
    """Return the first JSON list of objects (or the empty list) in the text; the word None is the empty list."""
    if text.strip(" \t\r\n.`").casefold() == "none":
        return []
    start = _LIST_START.search(text)
    try:
        return _DECODER.raw_decode(text, start.start())[0] if start else None
    except (ValueError, RecursionError):
        return None


def _detection(entry: Any) -> Detection | None:
    if not isinstance(entry, dict):
        return None
    box = _as_box(entry.get("bbox_2d", entry.get("bbox")))
    label = entry.get("label", "")
    return Detection(box, label.strip().casefold()) if box is not None and isinstance(label, str) else None


def _as_box(value: Any) -> Box | None:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    # A bool is an int in Python, but not a coordinate. Integers beyond the range of floats would not convert.
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not -1e9 < x < 1e9 for x in value):
        return None
    return tuple(float(x) for x in value)  # type: ignore[return-value]


def gold_box(value: Any) -> Box:
    """Return the gold box of a row: four numbers, {"bbox"|"bbox_2d": [...]}, or text that holds either.

    Raises:
        UserError: the value holds no box, or a box without area.
    """
    if isinstance(value, dict):
        value = value.get("bbox_2d", value.get("bbox"))
    box = first_box(value) if isinstance(value, str) else _as_box(value)
    if box is None or area(box) == 0:
        raise UserError(f"the gold answer is {value!r}: expected a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return box


def gold_detections(value: Any) -> list[Detection]:
    """Return the gold detections of a row: a list of {"bbox_2d", "label"}, or text that holds one.

    An empty list or the word None means that the image has no such object.

    Raises:
        UserError: the value is anything else, or an entry has no box with an area.
    """
    entries = _json_list(value) if isinstance(value, str) else value
    found = [_detection(entry) for entry in entries] if entries is not None else [None]
    if any(detection is None or area(detection.box) == 0 for detection in found):
        raise UserError(
            f"the gold answer is {value!r}: expected a list of {{'bbox_2d': [x1, y1, x2, y2], 'label': ...}}"
        )
    return [detection for detection in found if detection is not None]


# --- sizes ------------------------------------------------------------------------------------------------------------


def rescale_box(box: Box, from_size: tuple[float, float], to_size: tuple[float, float]) -> Box:
    """Scale a box from an image of `from_size` (width, height) to the same image at `to_size`."""
    x_scale, y_scale = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return (box[0] * x_scale, box[1] * y_scale, box[2] * x_scale, box[3] * y_scale)


def grid_size(image_grid_thw: Any, patch_size: int = 14) -> tuple[int, int]:
    """Return (width, height) in pixels of the vision tower's input, from its grid (time, height, width) in patches.

    Args:
        image_grid_thw: three numbers, or a list of such rows (the first image's is used).
        patch_size: pixels per patch: 14 for Qwen2-VL and Qwen2.5-VL, 16 for Qwen3-VL.
    """
    grid = np.asarray(image_grid_thw).reshape(-1, 3)[0]
    return int(grid[2]) * patch_size, int(grid[1]) * patch_size


# --- measures ---------------------------------------------------------------------------------------------------------


def area(box: Box) -> float:
    """Return the area in square pixels; 0 for a box without an inside, such as one with swapped corners."""
    width, height = box[2] - box[0], box[3] - box[1]
    return width * height if width > 0 and height > 0 else 0.0


def box_iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, in [0, 1]. Coordinates are continuous: a width is x2 - x1."""
    if area(a) == 0 or area(b) == 0:
        return 0.0
    inter = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    iou = inter / (area(a) + area(b) - inter)
    return iou if math.isfinite(iou) else 0.0


def mean_average_precision(
    predictions: list[Detection], golds: list[Detection], thresholds: tuple[float, ...] = COCO_THRESHOLDS
) -> float:
    """Compute COCO mAP of one image with every prediction at confidence 1.

    It is the mean over gold labels and IoU thresholds of the average precision, interpolated at 101 recall points.
    Equal confidences keep the order of the answer. Predictions with a label that no gold box has are ignored, because
    COCO averages over gold labels only. The result is 1 if both lists are empty, 0 if one is.
    """
    if not golds or not predictions:
        return float(not golds and not predictions)
    per_label = []
    for label in dict.fromkeys(gold.label for gold in golds):
        gold_boxes = [gold.box for gold in golds if gold.label == label]
        boxes = [p.box for p in predictions if p.label == label][:MAX_DETECTIONS]
        ious = np.array([[box_iou(box, gold) for gold in gold_boxes] for box in boxes]).reshape(
            len(boxes), len(gold_boxes)
        )
        per_label += [_average_precision(ious, len(gold_boxes), threshold) for threshold in thresholds]
    return float(np.mean(per_label))


def _average_precision(ious: np.ndarray, num_golds: int, threshold: float) -> float:
    """Compute AP of one label at one threshold: each prediction in order takes the free gold box it overlaps most."""
    free = np.ones(num_golds, dtype=bool)
    hits = np.zeros(len(ious), dtype=bool)
    for i, row in enumerate(ious):
        candidates = np.where(free & (row >= min(threshold, 1 - 1e-10)), row, -1.0)
        # Among equal overlaps the last wins, as in pycocotools.
        best = num_golds - 1 - int(np.argmax(candidates[::-1]))
        if candidates[best] >= 0:
            free[best], hits[i] = False, True
    true_positives = np.cumsum(hits)
    precision = true_positives / np.arange(1, len(ious) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true_positives / num_golds, _RECALL_POINTS, side="left")
    return float(np.concatenate([precision, [0.0]])[np.minimum(at, len(ious))].mean())


def length_factor(num_predictions: int, num_golds: int) -> float:
    """Return VLM-R1's odLength penalty (arXiv 2504.07615): n_gold / n_predicted, at most 1."""
    return 1.0 if num_golds >= num_predictions else num_golds / num_predictions
