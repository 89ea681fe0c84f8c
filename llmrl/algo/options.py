"""Options that several families of algorithms share."""

from __future__ import annotations

from llmrl.option import Count, option


@option
class DynamicSampling:
    """Draw further tasks in place of groups whose accuracies are all equal."""

    max_batches: Count = 10
    """Draw at most this many batches for one step; then groups without signal fill the rest."""
