"""Reward for short-answer questions: exact match, F1 or substring against one or several gold answers, or the complete
reward of Search-R1 or DeepResearcher. In: a completion (or a rollout) and the row's gold answers; out: a Score.
"""

from __future__ import annotations

from typing import Any, Literal

from llmrl.errors import UserError
from llmrl.types import Message, Rollout, Score, Turn
from llmrl.verify.checks import answers as qa
from llmrl.verify.thinking import without_thinking

Measure = Literal["em", "f1", "substring", "search_r1", "deepresearcher"]
_MEASURES = {"em": qa.exact_match, "f1": qa.f1, "substring": qa.substring_match}


def qa_match(
    completion: str | list[Message],
    answer: Any = None,
    golden_answers: Any = None,
    answers: Any = None,
    reward_model: Any = None,
    rollout: Rollout | None = None,
    prefilled: str = "",
    *,
    measure: Measure = "em",
    normalizer: str = "squad_em",
    answer_tag: str | None = "answer",
    observations_inline: bool = False,
    structure_format_score: float = 0.2,
    retrieval_score: float = 0.0,
    final_format_score: float = 0.1,
) -> Score:
    """Compare the completion's answer with the gold answers; the best match counts.

    Args:
        completion: text, or messages (the last assistant message is read).
        answer: gold answer(s), in any form `answers.gold_answers` takes. The first of these four columns that holds an
            answer is used.
        golden_answers: gold answers (Natural Questions rows of FlashRAG).
        answers: gold answers (SQuAD, TriviaQA).
        reward_model: gold answers (Search-R1 and DeepResearcher rows).
        rollout: gives `search_r1` and `deepresearcher` all turns and the environment's replies.
        prefilled: how the prompt already begins the completion's message, such as `<think>`.
        measure: em, f1, substring; or `search_r1` (lattice of the three format scores) or `deepresearcher` (-1 or F1).
        normalizer: squad_em | deepresearcher_f1 | multilingual.
        answer_tag: the answer is the last <answer>...</answer> outside the thinking; without one the reward is 0.
            None: everything outside the thinking is the answer.
        observations_inline: for `search_r1`: the completion includes the environment's <information> blocks, as stored
            transcripts do. Otherwise the policy forged such a block, and the transcript counts as malformed.
        structure_format_score: for `search_r1`, as are the next two; see `answers.search_r1_reward`.
        retrieval_score: added when the retrieved text of a transcript holds a gold answer.
        final_format_score: for a wrong answer in a malformed transcript.

    Raises:
        UserError: unknown measure or normalizer, or the row has no gold answer.
    """
    golds = _golds(answer, golden_answers, answers, reward_model)
    text = prefilled + qa.completion_text(completion)
    answered = without_thinking(text)
    extracted = answered.strip() if answer_tag is None else qa.extract_tag(answered, answer_tag)
    # Compute the measures even if nothing was extracted, so that an unknown normalizer raises for any completion.
    parts = {name: function(extracted or "", golds, normalizer) for name, function in _MEASURES.items()}
    if measure in _MEASURES:
        reward = parts[measure]
    elif measure == "deepresearcher":
        reward = qa.deepresearcher_reward(_policy_text(text, rollout), golds)
    elif measure == "search_r1":
        reward = _search_r1(
            text,
            golds,
            rollout,
            observations_inline,
            normalizer=normalizer,
            structure_format_score=structure_format_score,
            retrieval_score=retrieval_score,
            final_format_score=final_format_score,
        )
    else:
        raise UserError(f"measure {measure!r} is unknown: use em, f1, substring, search_r1 or deepresearcher")
    return Score(reward=reward, parts=dict(parts), info={"extracted": extracted, "gold": golds})


def check(row: dict[str, Any]) -> str | None:
    """Say that the row has no gold answer, or that the options are unknown."""
    _golds(*(row.get(column) for column in ("answer", "golden_answers", "answers", "reward_model")))
    qa.get_normalizer(row.get("normalizer", "squad_em"))
    return None


def _golds(*columns: Any) -> list[str]:
    for column in columns:
        if golds := qa.gold_answers(column):
            return golds
    raise UserError("the row has no gold answer: give one of the columns answer, golden_answers, answers, reward_model")


def _policy_text(text: str, rollout: Rollout | None) -> str:
    if rollout is None or not rollout.turns:
        return text
    return "\n".join(_text_of(turn) for turn in rollout.turns)


def _text_of(turn: Turn) -> str:
    return turn.prefilled + str(turn.message.get("content") or "")


def _replies_to(turn: Turn) -> str:
    return "".join(str(reply.get("content") or "") for reply in turn.replies)


def _search_r1(text: str, golds: list[str], rollout: Rollout | None, inline: bool, **scores: Any) -> float:
    # Only the environment may write <information>: a policy that forged it would collect the retrieval score.
    forged = not inline and "information>" in _policy_text(text, rollout)
    if rollout is not None and rollout.turns:
        text = "".join(_text_of(turn) + _replies_to(turn) for turn in rollout.turns)
    return qa.search_r1_reward(text, golds, well_formed=False if forged else None, **scores)


EXAMPLES: list[dict[str, Any]] = [
    {"completion": "<think>easy</think><answer>The Eiffel Tower!</answer>", "answer": "eiffel tower", "reward": 1.0},
    {"completion": "<answer>R\u00f6ntgen</answer>", "golden_answers": ["Wilhelm Conrad R\u00f6ntgen"], "reward": 0.0},
    {
        "completion": "<answer>R\u00f6ntgen</answer>",
        "golden_answers": ["Wilhelm Conrad R\u00f6ntgen"],
        "measure": "f1",
        "reward": 0.5,
    },
    {
        "completion": "<answer>It was Wilhelm Conrad R\u00f6ntgen.</answer>",
        "golden_answers": ["Wilhelm Conrad R\u00f6ntgen"],
        "measure": "substring",
        "reward": 1.0,
    },
    {"completion": "<answer>NYC</answer>", "answer": ["New York City", "NYC"], "reward": 1.0},
    {
        "completion": "<answer>\u300c\u5317\u4eac\u5e02\u300d\u3002</answer>",
        "answer": "\u5317\u4eac\u5e02",
        "normalizer": "multilingual",
        "reward": 1.0,
    },
    {"completion": "So it is Paris.", "answer": "Paris", "answer_tag": None, "reward": 0.0},
    {"completion": "<think>London?</think>Paris", "answer": "Paris", "answer_tag": None, "reward": 1.0},
    # Hostile: an answer in the thinking, no tags, an unclosed tag, many answers, nothing, a gold answer of no words.
    {"completion": "<think><answer>Paris</answer></think>", "answer": "Paris", "reward": 0.0},
    {"completion": "Paris Paris Paris", "answer": "Paris", "reward": 0.0},
    {"completion": "<answer>Paris", "answer": "Paris", "reward": 0.0},
    {"completion": "<answer>Paris or London or Rome</answer>", "answer": "Paris", "reward": 0.0},
    {"completion": "", "answer": "Paris", "reward": 0.0},
    {"completion": "<answer>an</answer>", "answer": "The", "reward": 0.0},
    {"completion": "<answer></answer>", "answer": "?", "measure": "substring", "reward": 0.0},
    {
        "completion": "<think>t</think><search>q</search><information>Paris is</information><think>t</think>"
        "<answer>Paris</answer>",
        "answer": "Paris",
        "measure": "search_r1",
        "observations_inline": True,
        "reward": 1.0,
    },
    {
        "completion": "<think>t</think><search>q</search><information>Paris is</information><think>t</think>"
        "<answer>Rome</answer>",
        "answer": "Paris",
        "measure": "search_r1",
        "retrieval_score": 0.3,
        "reward": 0.1,
    },
    {
        "completion": "t</think><answer>Paris</answer>",
        "prefilled": "<think>",
        "answer": "Paris",
        "measure": "search_r1",
        "reward": 1.0,
    },
    {"completion": "t <answer>Paris</answer>", "prefilled": "<think>", "answer": "Paris", "reward": 0.0},
    {"completion": "I say <answer>Paris</answer>", "answer": "Paris", "measure": "search_r1", "reward": 0.8},
    {
        "completion": "<think>t</think><answer>Rome</answer>",
        "reward_model": {"ground_truth": {"target": ["Paris"]}},
        "measure": "search_r1",
        "reward": 0.2,
    },
    {"completion": "<answer>Paris</answer>", "answer": "Paris", "measure": "deepresearcher", "reward": 1.0},
    {
        "completion": "<think>no end <answer>Paris</answer>",
        "answer": "Paris",
        "measure": "deepresearcher",
        "reward": -1,
    },
]
