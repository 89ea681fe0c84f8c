"""Streams: one number per trained token, computed once for a batch and known to every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.model.modes import evaluating

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.model.parallel import Parallel
    from llmrl.train.packing import Layout
    from llmrl.types import MicroBatch, Sample

Found = dict[int, dict[str, np.ndarray]]
"""Streams by index of sample and by name."""


@torch.no_grad()
def compute_streams(layout: Layout, samples: list[Sample], compute: Callable[[MicroBatch], dict[str, Tensor]]) -> None:
    """Compute streams of the samples, each process its share, and set them on all samples on every process.

    Args:
        layout: how samples become micro-batches.
        samples: where the streams are set.
        compute: gives the streams of a micro-batch, by name.
    """
    if not samples:
        return
    indices, lengths, parts = list[int](), list[int](), dict[str, "list[Tensor]"]()
    with evaluating(layout.policy.wrapped):
        for micro_batch in layout.micro_batches(samples):
            indices += micro_batch.sample_indices
            lengths += [sample.num_tokens for sample in micro_batch.samples]
            for name, values in compute(micro_batch).items():
                parts.setdefault(name, []).append(values.float())
    found: Found = {index: {} for index in indices}
    for name, values in parts.items():
        # One copy to the host for all micro-batches: each would wait until the device has nothing left to do.
        for index, part in zip(indices, split(torch.cat(values).cpu().numpy(), lengths), strict=True):
            found[index][name] = part
    share_streams(layout.parallel, samples, found)


def split(stream: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Cut a stream of several sequences into those of each, which has `lengths` trained tokens."""
    return np.split(stream, np.cumsum(lengths[:-1])) if lengths else []


def share_streams(parallel: Parallel, samples: list[Sample], found: Found) -> Found:
    """Set streams on every process: on the sample where it has such a field, else in its `extras`.

    Returns:
        The streams that all processes found.
    """
    found = dict(parallel.gather_objects([*found.items()]))
    for index, streams in found.items():
        for name, values in streams.items():
            if hasattr(samples[index], name):
                setattr(samples[index], name, values)
            else:
                samples[index].extras[name] = values
    return found
