"""Citation-aware rubrics: a deep-research conversation and its single-hop rubrics in, outcome and rubric reward out.

CaRR (arXiv 2601.06021): a rubric counts if the answer names its hidden entities, the cited pages support it, and a
chain of supported rubrics connects it to the final answer. `llmrl.algo.ops.mixing` mixes the two rewards.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmrl.types import Message
from llmrl.verify.citations.pages import final_response, gather_evidence
from llmrl.verify.citations.support import PLACEHOLDER, entities_of, identify_entities, judge_support
from llmrl.verify.judge.correct import judge_correct
from llmrl.verify.judge.verdict import AnyJudge

ANSWER_ENTITY = "E0"
"""The placeholder that stands for the final answer in every rubric set."""


@dataclass(frozen=True, kw_only=True)
class RubricOptions:
    """Which parts of the rubric check are on. The defaults are the paper's method, plus `check_quotes`."""

    check_entities: bool = True
    """Check only rubrics whose entities are all named. Off: check all, with unnamed placeholders left in."""
    check_connectivity: bool = True
    """Count only rubrics that supported rubrics connect to the answer. Off: count every supported one."""
    check_quotes: bool = True
    """Ignore a citation next to a quotation that is not on the cited page (not in the paper)."""
    max_pages: int = 20
    """Number of cited pages shown to the judge."""


@dataclass(kw_only=True)
class RubricRecord:
    """The result for one rubric."""

    raw_rubric: str
    filled_rubric: str
    entity_values: dict[str, str | None]
    all_entity_identified: bool
    is_supported: bool = False
    connected_to_answer: bool = False
    score: int = 0


@dataclass(kw_only=True)
class Evaluation:
    """Both rewards of one conversation, each None if the judge abstained."""

    outcome: float | None = 0.0
    rubric: float | None = 0.0
    records: list[RubricRecord] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


# --- the graph --------------------------------------------------------------------------------------------------------


def connected_rubrics(rubrics: Sequence[str], supported: Sequence[bool]) -> list[int]:
    """Return the indices of the supported rubrics that a chain of supported rubrics with shared entities links to <E0>.

    Breadth-first search on the bipartite graph of entities and supported rubrics (CaRR, arXiv 2601.06021). A rubric
    without placeholders is never reached.
    """
    rubrics_of: dict[str, list[int]] = {}
    for i, rubric in enumerate(rubrics):
        for entity in entities_of(rubric) if supported[i] else ():
            rubrics_of.setdefault(entity, []).append(i)
    reached, found, queue = {ANSWER_ENTITY}, set(), deque([ANSWER_ENTITY])
    while queue:
        for i in rubrics_of.get(queue.popleft(), ()):
            if i in found:
                continue
            found.add(i)
            new = [entity for entity in entities_of(rubrics[i]) if entity not in reached]
            reached.update(new)
            queue.extend(new)
    return sorted(found)


def fill_rubric(rubric: str, values: dict[str, str | None]) -> RubricRecord:
    """Replace the placeholders of identified entities in a rubric by their names."""
    own = {entity: values.get(entity) for entity in entities_of(rubric)}
    filled = PLACEHOLDER.sub(lambda match: own[match.group(1)] or match.group(), rubric)
    identified = all(value is not None for value in own.values())
    return RubricRecord(raw_rubric=rubric, filled_rubric=filled, entity_values=own, all_entity_identified=identified)


# --- scoring ----------------------------------------------------------------------------------------------------------


async def score_rubrics(
    judge: AnyJudge,
    question: str,
    response: str,
    history: list[Message],
    rubrics: Sequence[str],
    options: RubricOptions | None = None,
) -> Evaluation:
    """Compute the rubric reward: connected supported rubrics over all rubrics, in [0, 1] (CaRR, section 3).

    It is 0 if nothing is cited, no cited page is in the history, no entity is named or there are no rubrics, and None
    if the judge abstains.

    Args:
        judge: is asked at most two questions.
        question: the question that the conversation answers.
        response: the judged part of the answer (`pages.judged_text`).
        history: the conversation with its tool outputs, the source of the evidence.
        rubrics: single-hop facts with placeholders.
        options: which checks are on.
    """
    options = options or RubricOptions()
    if not rubrics:
        return Evaluation(info={"reason": "the task has no rubrics"})
    values = await identify_entities(judge, question, response, rubrics)
    if values is None:
        return Evaluation(rubric=None, info={"reason": "the judge abstained on the entities"})
    result = Evaluation(records=[fill_rubric(rubric, values) for rubric in rubrics])
    asked = [r for r in result.records if r.all_entity_identified or not options.check_entities]
    evidence = gather_evidence(response, history, max_pages=options.max_pages, check_quotes=options.check_quotes)
    result.info["citations"] = {
        "cited": evidence.num_cited,
        "used": [page.url for page in evidence.pages],
        "unseen": evidence.unseen,
        "misquoted": evidence.misquoted,
    }
    if not asked or not evidence.pages:
        result.info["reason"] = "no cited page was seen" if asked else "no rubric has all its entities named"
        return result
    supported = await judge_support(judge, evidence.pages, [record.filled_rubric for record in asked])
    if supported is None:
        result.rubric, result.info["reason"] = None, "the judge abstained on the support"
        return result
    for record, verdict in zip(asked, supported, strict=True):
        record.is_supported = verdict
    return _count_connected(result, options)


def _count_connected(result: Evaluation, options: RubricOptions) -> Evaluation:
    flags = [record.is_supported for record in result.records]
    for i in connected_rubrics([record.raw_rubric for record in result.records], flags):
        result.records[i].connected_to_answer = True
    for record in result.records:
        record.score = int(record.is_supported and (record.connected_to_answer or not options.check_connectivity))
    result.rubric = sum(record.score for record in result.records) / len(result.records)
    return result


async def evaluate(
    judge: AnyJudge,
    history: list[Message],
    question: str,
    known_answers: Sequence[str],
    rubrics: Sequence[str],
    *,
    unfinished: bool = False,
    need_outcome: bool = True,
    need_rubric: bool = True,
    rubric_only_if_correct: bool = False,
    options: RubricOptions | None = None,
) -> Evaluation:
    """Compute outcome and rubric reward of one conversation.

    A conversation that is unfinished, or does not end with an answer of the assistant, gets 0 for both and the judge is
    not asked. A reward that is not needed is 0 and not asked for.

    Args:
        judge: is asked at most three questions.
        history: the conversation; its last message is the answer.
        question: the question that the conversation answers.
        known_answers: gold answers; any of them is correct.
        rubrics: single-hop facts with placeholders.
        unfinished: the rollout was cut off.
        need_outcome: ask about the answer.
        need_rubric: ask about the rubrics.
        rubric_only_if_correct: skip the rubric questions if the outcome is 0; the rubric reward is then 0.
        options: which checks are on.
    """
    response = None if unfinished else final_response(history)
    if response is None:
        return Evaluation(info={"reason": "unfinished" if unfinished else "no final answer"})

    async def outcome() -> tuple[float | None, dict[str, Any]]:
        return await judge_correct(judge, question, known_answers, response) if need_outcome else (0.0, {})

    async def rubric() -> Evaluation:
        return (
            await score_rubrics(judge, question, response, history, rubrics, options) if need_rubric else Evaluation()
        )

    if rubric_only_if_correct:
        reward, verdict = await outcome()
        skipped = Evaluation(
            rubric=0.0 if reward == 0 else None, info={"reason": "not judged: the outcome is not correct"}
        )
        result = await rubric() if reward else skipped
    else:
        (reward, verdict), result = await asyncio.gather(outcome(), rubric())
    result.outcome = reward
    result.info["outcome_verdict"] = verdict
    return result


def record_dicts(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the records of the rubrics as plain data, by index."""
    return {str(i): asdict(record) for i, record in enumerate(evaluation.records)}
