"""Metrics of a translation: source, translation and reference in; chrF, BLEU, TER or a server's scores out.

sacrebleu computes chrF, BLEU and TER. Neural metrics (COMET-Kiwi) run in an environment of their own, behind
scripts/serve_translation_metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from llmrl.endpoint import EndpointError, shared_endpoint
from llmrl.errors import UserError
from llmrl.json_server import key_headers
from llmrl.verify.judge.verdict import clean_text
from llmrl.verify.translation.language import base_language

LOCAL_METRICS = ("chrf", "bleu", "ter")
TIMEOUT_S = 120.0
RETRIES = 5
MAX_CONCURRENCY = 64


async def metric_value(
    metric: str, source: str, translation: str, reference: str | None, target_language: str
) -> float:
    """Compute the metric of one translation; higher is better.

    chrF / 100, BLEU / 100 and 1 - TER / 100 lie in [0, 1]; a server's score is returned as it is.

    Args:
        metric: chrf, bleu, ter, or the URL of a metric server.
        source: the source text.
        translation: the text to score.
        reference: a human translation; chrf, bleu and ter need it.
        target_language: ISO 639-1 code, for the tokenizer.
    """
    if metric in LOCAL_METRICS:
        scorer = _sacrebleu_metric(metric, base_language(target_language))
        score = scorer.sentence_score(clean_text(translation), [clean_text(reference or "")]).score / 100
        return max(0.0, 1 - score) if metric == "ter" else score
    return (await metric_scores(metric, [{"src": source, "mt": translation, "ref": reference}]))[0]


def surface_metrics(
    translation: str, reference: str, target_language: str, metrics: Sequence[str] = LOCAL_METRICS
) -> dict[str, Any]:
    """Compute sacrebleu's metrics of one segment (0-100; for TER lower is better), with their signatures."""
    found: dict[str, Any] = {}
    for name in metrics:
        metric = _sacrebleu_metric(name, base_language(target_language))
        found[name] = round(metric.sentence_score(clean_text(translation), [clean_text(reference)]).score, 4)
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


async def metric_scores(url: str, samples: list[dict[str, str | None]]) -> list[float]:
    """Ask a metric server (POST url/score) for one score per sample {src, mt, ref}.

    Raises:
        EndpointError: the server failed, or did not return one finite number per sample.
    """
    endpoint = shared_endpoint(
        url.rstrip("/") + "/score",
        headers=key_headers(),
        timeout_s=TIMEOUT_S,
        retries=RETRIES,
        max_concurrency=MAX_CONCURRENCY,
    )
    cleaned = [{name: clean_text(text) for name, text in sample.items() if text is not None} for sample in samples]
    return _finite_scores(await endpoint.post({"samples": cleaned}), len(samples), url)


def _finite_scores(reply: dict[str, Any], count: int, url: str) -> list[float]:
    scores = reply.get("scores")
    numbers = scores if isinstance(scores, list) else []
    if len(numbers) != count or not all(
        isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score) for score in numbers
    ):
        raise EndpointError(f"{url}: expected {count} finite scores, got {str(scores)[:200]}")
    return [float(score) for score in numbers]


@cache
def _sacrebleu_metric(name: str, language: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError:
        raise UserError("chrF, BLEU and TER need sacrebleu: pip install 'llmrl[translation]'") from None
    asian = language in ("zh", "ja", "ko", "th")
    if name == "bleu":
        # sacrebleu's ja and ko tokenizers need MeCab. Characters need nothing and are the usual choice for segments.
        tokenize = {"zh": "zh"}.get(language, "char" if asian else "13a")
        return BLEU(tokenize=tokenize, effective_order=True)
    return CHRF() if name == "chrf" else TER(asian_support=asian, normalized=asian)
