"""Translation rewards: form, language, copies, comparison, metrics; on real sentence pairs if they are available."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl import endpoint as judge_http
from llmrl.errors import UserError
from llmrl.verify.judge.judge import EndpointError, OfflineJudge
from llmrl.verify.translation.compare import COMPARE, FORMAT, GRADE, THOUGHT, copied_share, parse_output
from llmrl.verify.translation.language import base_language, is_language
from llmrl.verify.translation.metrics import metric_scores, metric_value, surface_metrics
from rewards.translation_compare import translation_compare
from tests.verify.texts import assert_linear

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT.parent / "shared" / "data" / "translation"
SERVER = ROOT / "scripts" / "serve_translation_metric"
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))

SOURCE = "The old fisherman mended his nets before the storm reached the harbour."
GOOD = "Der alte Fischer flickte seine Netze, bevor der Sturm den Hafen erreichte."
OTHER = "Der betagte Fischer reparierte die Netze, ehe das Unwetter in den Hafen kam."
THOUGHT_TEXT = "<think>'mended' wants a concrete verb.</think>"


def table_judge(**answers: Any) -> tuple[OfflineJudge, list[tuple[str, dict[str, str]]]]:
    """Make a judge that answers by question name (a value or a function of the case), and its list of questions."""
    asked: list[tuple[str, dict[str, str]]] = []
    usual = {"translation_format": "translation_only", "translation_thought": "slight_analysis"}

    def answer(name: str, case: dict[str, str]) -> dict[str, Any] | None:
        asked.append((name, case))
        value = {**usual, **answers}[name]
        value = value(case) if callable(value) else value
        key = {"translation_comparison": "verdict", "translation_grade": "grade"}.get(name, "kind")
        return None if value is None else {"reason": "", key: value}

    return OfflineJudge(answer), asked


def score(translation: str, *, thought: str = THOUGHT_TEXT, judge: Any = None, **options: Any) -> Any:
    row = {
        name: options.pop(name) for name in ("exemplar", "reference", "source", "target_language") if name in options
    }
    row = {"source": SOURCE, "exemplar": OTHER, "target_language": "de", **row}
    return asyncio.run(
        translation_compare(thought + translation, source_language="en", judge=judge, options=options, **row)
    )


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "required", "expected"),
    [
        ("<think> a </think> b ", True, ("a", "b")),
        ("\n<think>a\nb</think>\nc\nd", True, ("a\nb", "c\nd")),
        ("b", True, None),
        ("b", False, ("", "b")),
        ("<think>a</think>b", False, ("a", "b")),
        ("x <think>a</think>b", True, None),
        ("<think>a</think>", True, None),
        ("<think> </think>b", True, None),
        ("<think>a</think>b</think>c", True, None),
        ("<think>a<think>b</think>c", True, None),
        ("</think>a<think>", True, None),
        ("<think>a", False, None),
        ("  ", False, None),
    ],
)
def test_parse_output(text: str, required: bool, expected: tuple[str, str] | None) -> None:
    output = parse_output(text, require_thought=required)
    assert (None if output is None else (output.thought, output.translation)) == expected


hostile_text = st.text(st.characters(), max_size=200) | st.text(
    "<think></think> \x00\ud800\u4e2d\u0430a.", max_size=200
)


@settings(max_examples=200, deadline=None)
@given(hostile_text)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for required in (True, False):
        output = parse_output(text, require_thought=required)
        assert output is None or output.translation.strip() == output.translation != ""
    assert 0 <= copied_share(text, SOURCE) <= 1 and copied_share(text, text) == 1
    assert not is_language(text, "ko") or any("\u1100" <= c <= "\ud7af" for c in text)
    assert score(text, thought="", mode="light", target_language="zh").reward in (0.0, 1.0)


@pytest.mark.parametrize("unit", ["<think>", "</think>", "a", "\u4e2d", "\ud800", "\x00", "A b. "])
def test_long_texts_cost_linear_time(unit: str) -> None:
    def scored(text: str) -> None:
        assert score(text, mode="light", target_language="zh").reward == 0.0
        assert score(text, thought="", mode="light", target_language="zh").reward == 0.0

    assert_linear(scored, unit)


# --- language and copies ----------------------------------------------------------------------------------------------

SENTENCES = {
    "en": "The minister said on Sunday that the new rules would apply from next week.",
    "de": "Der Minister sagte am Sonntag, dass die neuen Regeln ab der kommenden Woche gelten.",
    "fr": (
        "Le ministre a d\u00e9clar\u00e9 dimanche que les nouvelles r\u00e8gles s'appliqueraient la semaine prochaine."
    ),
    "es": ("El ministro dijo el domingo que las nuevas normas se aplicar\u00e1n a partir de la pr\u00f3xima semana."),
    "it": "Il ministro ha detto domenica che le nuove regole si applicheranno dalla prossima settimana.",
    "cs": (
        "Ministr v ned\u011bli \u0159ekl, \u017ee nov\u00e1 pravidla budou platit od p\u0159\u00ed\u0161t"
        "\u00edho t\u00fddne."
    ),
    "ru": (
        "\u041c\u0438\u043d\u0438\u0441\u0442\u0440 \u0441\u043a\u0430\u0437\u0430\u043b \u0432 \u0432\u043e"
        "\u0441\u043a\u0440\u0435\u0441\u0435\u043d\u044c\u0435, \u0447\u0442\u043e \u043d\u043e\u0432\u044b"
        "\u0435 \u043f\u0440\u0430\u0432\u0438\u043b\u0430 \u0432\u0441\u0442\u0443\u043f\u044f\u0442 \u0432 "
        "\u0441\u0438\u043b\u0443."
    ),
    "ar": (
        "\u0642\u0627\u0644 \u0627\u0644\u0648\u0632\u064a\u0631 \u064a\u0648\u0645 \u0627\u0644\u0623\u062d"
        "\u062f \u0625\u0646 \u0627\u0644\u0642\u0648\u0627\u0639\u062f \u0627\u0644\u062c\u062f\u064a\u062f"
        "\u0629 \u0633\u062a\u0637\u0628\u0642."
    ),
    "zh": (
        "\u90e8\u957f\u5468\u65e5\u8868\u793a\uff0c\u65b0\u89c4\u5b9a\u5c06\u4ece\u4e0b\u5468\u5f00\u59cb"
        "\u5b9e\u65bd\uff0c\u9002\u7528\u4e8e\u6240\u6709\u4eba\u3002"
    ),
    "ja": (
        "\u5927\u81e3\u306f\u65e5\u66dc\u65e5\u3001\u65b0\u3057\u3044\u898f\u5247\u304c\u6765\u9031\u304b"
        "\u3089\u9069\u7528\u3055\u308c\u308b\u3068\u8ff0\u3079\u305f\u3002"
    ),
    "ko": (
        "\uc7a5\uad00\uc740 \uc77c\uc694\uc77c\uc5d0 \uc0c8 \uaddc\uce59\uc774 \ub2e4\uc74c \uc8fc\ubd80"
        "\ud130 \uc801\uc6a9\ub41c\ub2e4\uace0 \ub9d0\ud588\ub2e4."
    ),
}
has_langid = importlib.util.find_spec("py3langid") is not None
needs_langid = pytest.mark.skipif(not has_langid, reason="py3langid (extra translation) is not installed")


@needs_langid
@pytest.mark.parametrize("written", SENTENCES)
def test_each_language_is_itself_and_no_other(written: str) -> None:
    assert [target for target in SENTENCES if is_language(SENTENCES[written], target)] == [written]


def test_names_kept_from_the_source_do_not_count() -> None:
    source = "Angela Merkel met Emmanuel Macron and Boris Johnson in Brussels on Friday."
    mixed = "Angela Merkel \u5468\u4e94\u5728 Brussels \u4f1a\u89c1\u4e86 Emmanuel Macron \u548c Boris Johnson\u3002"
    assert is_language(mixed, "zh", source_text=source)
    assert not is_language("Angela Merkel", "zh", source_text=source)
    assert not is_language(mixed + " met and on in the town there", "zh", source_text=source)


def test_language_codes() -> None:
    assert [base_language(code) for code in ("zh-CN", "ZH_Hans", " de ")] == ["zh", "zh", "de"]
    with pytest.raises(UserError, match="'klingon'"):
        base_language("klingon")


def test_without_py3langid_only_languages_of_one_script_need_it(monkeypatch: Any) -> None:
    from llmrl.verify.translation import language

    monkeypatch.setitem(sys.modules, "py3langid", None)
    language._identifier.cache_clear()
    assert is_language(SENTENCES["zh"], "zh") and not is_language(SENTENCES["de"], "zh")
    with pytest.raises(UserError, match=r"llmrl\[translation\]"):
        is_language(SENTENCES["de"], "de")


def test_copied_share() -> None:
    assert copied_share(SOURCE, SOURCE.upper().replace(" ", "-")) == 1
    assert copied_share(SOURCE, f"{GOOD} {SOURCE}") == 1
    assert copied_share(SOURCE, SOURCE.replace("storm", "gale")) > 0.5
    assert copied_share(SOURCE, GOOD) == 0
    assert copied_share("Yes!", "yes") == 1 and copied_share("Yes!", "Ja!") == 0


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "there", "options", "expected"),
    [
        ("much_better", "much_worse", {}, 5.0),
        ("better", "much_worse", {}, 4.5),
        ("comparable", "comparable", {}, 3.0),
        ("worse", "better", {}, 2.0),
        ("much_worse", "much_better", {}, 1.0),
        ("better", "better", {}, 3.0),
        ("better", "better", {"on_contradiction": "abstain"}, None),
        ("better", "worse", {"levels": 3}, 5.0),
        ("worse", "better", {"levels": 3}, 1.0),
        ("comparable", "comparable", {"levels": 3}, 3.0),
    ],
)
@needs_langid
def test_comparison_levels_in_both_orders(here: str, there: str, options: Any, expected: float | None) -> None:
    judge, asked = table_judge(translation_comparison=lambda case: here if case["translation_a"] == GOOD else there)
    result = score(GOOD, judge=judge, **options)
    assert result.parts["comparison"] == expected
    assert result.reward == (None if expected is None else expected + 1.0)
    orders = [
        (case["translation_a"], case["translation_b"]) for name, case in asked if name == "translation_comparison"
    ]
    assert sorted(orders) == sorted([(GOOD, OTHER), (OTHER, GOOD)])


@needs_langid
def test_weights() -> None:
    judge, _ = table_judge(
        translation_comparison=lambda case: "better" if case["translation_a"] == GOOD else "worse",
        translation_thought="detailed_analysis",
    )
    result = score(
        GOOD, judge=judge, reference=GOOD, metric="chrf", comparison_weight=2.0, thought_weight=0.5, metric_weight=10.0
    )
    assert result.parts == {"format": 1.0, "comparison": 4.0, "thought": 2.0, "metric": pytest.approx(1.0)}
    assert result.reward == pytest.approx(2 * 4 + 0.5 * 2 + 10)
    assert "nc:6|nw:0" in result.info["surface"]["chrf_signature"] and result.info["surface"]["chrf"] == 100


@needs_langid
def test_only_the_judged_directions_are_judged() -> None:
    judge, asked = table_judge(translation_comparison="comparable")
    found = score(GOOD, judge=judge, exemplar=None, judged_directions=["de-en", "zh-en"], light_reward=0.5)
    assert (found.reward, found.info["mode"], asked) == (0.5, "light", [])
    full = score(GOOD, judge=judge, judged_directions=["zh-en", "en-de_AT"])
    assert full.info["mode"] == "compare" and asked
    for wrong in ("en", "en-xx"):
        with pytest.raises(UserError, match=r"judged_directions|'xx'"):
            score(GOOD, judge=judge, judged_directions=[wrong])


@needs_langid
def test_deeptrans_grade_and_thought() -> None:
    judge, asked = table_judge(translation_grade=80, translation_thought="detailed_analysis")
    assert score(GOOD, judge=judge, mode="grade", thought_weight=20.0).reward == 80 + 20 * 2
    judge, asked = table_judge(translation_grade=80)
    assert score(GOOD, thought="", judge=judge, mode="grade", require_thought=False).reward == 80
    assert sorted(name for name, _ in asked) == ["translation_format", "translation_grade"]


@pytest.mark.parametrize("silent", ["translation_format", "translation_thought", "translation_comparison"])
@needs_langid
def test_an_abstention_anywhere_is_an_abstention(silent: str) -> None:
    judge, _ = table_judge(**{"translation_comparison": "comparable", silent: None})
    result = score(GOOD, judge=judge)
    assert result.reward is None and result.error is None
    assert result.info["abstained"] == [silent.removeprefix("translation_")]


@pytest.mark.parametrize(
    ("translation", "fault"),
    [
        (SOURCE, "copy of the source"),
        (f"{GOOD} {SOURCE}", "copy of the source"),
        (OTHER, "copy of the exemplar"),
        (OTHER.upper(), "copy of the exemplar"),
        (OTHER[:-2] + OTHER[-1:], "copy of the exemplar"),
        (OTHER[1:], "copy of the exemplar"),
        (SENTENCES["fr"], "not in language de"),
        (SENTENCES["zh"], "not in language de"),
        (GOOD * 9, "length is"),
        ("Ja.", "length is"),
        ("", "not in the form"),
    ],
)
@needs_langid
def test_a_fault_earns_zero_without_asking_the_judge(translation: str, fault: str) -> None:
    judge, asked = table_judge(translation_comparison="comparable")
    for options in ({"judge": judge}, {"mode": "light"}):
        result = score(translation, **options)
        assert result.reward == 0.0 and fault in result.info["fault"]
    assert asked == []


def test_short_sources_in_ideographs_are_found_in_a_translation() -> None:
    assert copied_share("他昨天去了北京。", "He went to Beijing yesterday. 他昨天去了北京") == 1
    assert copied_share("他昨天去了北京。", "He went to Beijing yesterday.") == 0
    assert copied_share("北京", "北京") == 1 and copied_share("北京", "Beijing 北京") == 0, "too short to tell"
    assert copied_share("He left.", "He left. Er ging.") == 0, "too short to tell"


def test_short_exemplars_agree_by_chance() -> None:
    judge, asked = table_judge(translation_comparison="comparable")
    assert (
        score(
            "\u662f\u7684\u3002", source="Yes, it is.", exemplar="\u662f\u7684", target_language="zh", judge=judge
        ).reward
        == 4.0
    )
    assert len(asked) == 4


@needs_langid
def test_a_note_found_by_the_judge_earns_zero_without_further_questions() -> None:
    judge, asked = table_judge(translation_format="translation_with_additions")
    assert score(GOOD, judge=judge).reward == 0.0
    assert [name for name, _ in asked] == ["translation_format"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "compare", "exemplar": None}, "exemplar"),
        ({"mode": "metric"}, "needs `metric`"),
        ({"mode": "light", "metric": "comet"}, "URL"),
        ({"mode": "light", "metric": "chrf"}, "reference"),
        ({"mode": "best"}, "'best'"),
        ({"levels": 4}, "levels"),
        ({"weight": 1}, "unknown options"),
        ({"mode": "light", "surface": ["comet"]}, "surface"),
        ({"mode": "compare"}, "needs a judge"),
        ({"mode": "light", "source": " "}, "source"),
    ],
)
def test_user_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(GOOD, **options)


def test_canaries_have_the_fields_of_their_questions() -> None:
    for question in (FORMAT, THOUGHT, GRADE, *COMPARE.values()):
        assert question.canaries
        for canary in question.canaries:
            assert set(canary.expected) <= set(question.fields)
    grade = GRADE.canaries[0]
    assert grade.agrees({"grade": 90}) and not grade.agrees({"grade": 10}) and not grade.agrees(None)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_surface_metrics() -> None:
    same = surface_metrics(GOOD, GOOD, "de")
    assert (same["chrf"], same["bleu"], same["ter"]) == (100, pytest.approx(100), 0)
    assert "tok:13a" in same["bleu_signature"] and "version:" in same["ter_signature"]
    zh = surface_metrics(SENTENCES["zh"][:10], SENTENCES["zh"], "zh-CN")
    assert "tok:zh" in zh["bleu_signature"] and 0 < zh["chrf"] < 100 and 0 < zh["ter"] < 100
    assert surface_metrics("a\ud800", "b", "en")["chrf"] == 0


def test_ter_is_inverted() -> None:
    values = [asyncio.run(metric_value("ter", SOURCE, text, GOOD, "de")) for text in (GOOD, OTHER, "x y " * 99)]
    assert values[0] == 1 and 0 < values[1] < 1 and values[2] == 0


@pytest.fixture(scope="module")
def metric_url() -> Iterator[str]:
    command = [sys.executable, str(SERVER), "--metric", "chrf", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(10)


def test_metric_server(metric_url: str) -> None:
    import httpx

    samples: Any = [{"src": SOURCE, "mt": text, "ref": GOOD} for text in (GOOD, OTHER, "\ud800")]
    same, other, nothing = asyncio.run(metric_scores(metric_url, samples))
    assert same == pytest.approx(1.0) and 0 < other < 1 and nothing == 0
    assert asyncio.run(metric_scores(metric_url, [])) == []
    assert httpx.get(f"{metric_url}/health").json() == {"metric": "chrf"}
    with pytest.raises(EndpointError, match="needs 'ref'"):
        asyncio.run(metric_scores(metric_url, [{"src": "a", "mt": "b", "ref": None}]))
    for body in (b"{", b"[]", b'{"samples": 1}', b'{"samples": [{"src": 1, "mt": "b"}]}', b"[" * 100_000):
        assert httpx.post(f"{metric_url}/score", content=body).status_code == 400


@needs_langid
def test_metric_server_as_a_reward(metric_url: str) -> None:
    assert score(GOOD, reference=GOOD, mode="metric", metric=metric_url, metric_weight=2.0).reward == pytest.approx(2.0)
    assert 0 < score(OTHER, exemplar=None, reference=GOOD, mode="metric", metric=metric_url).reward < 1


def server_script() -> Any:
    """Load scripts/serve_translation_metric as a module."""
    loader = SourceFileLoader("serve_translation_metric", str(SERVER))
    spec = importlib.util.spec_from_loader("serve_translation_metric", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_waiting_requests_are_one_batch_and_only_the_faulty_one_fails() -> None:
    batches: list[int] = []
    go = threading.Event()

    def scorer(samples: list[dict[str, Any]]) -> list[float]:
        go.wait(10)
        batches.append(len(samples))
        return [float(sample["mt"]) for sample in samples]

    batcher = server_script().Batcher(scorer, max_samples=100)
    threading.Thread(target=batcher.run, daemon=True).start()
    results: dict[str, Any] = {}

    def ask(texts: list[str]) -> None:
        try:
            results[texts[0]] = batcher.score([{"mt": text} for text in texts])
        except ValueError:
            results[texts[0]] = "failed"

    threads = [threading.Thread(target=ask, args=(texts,)) for texts in (["1", "2"], ["3"], ["x"], ["4", "5", "6"])]
    threads[0].start()
    time.sleep(0.1)  # the first request occupies the scorer while the others queue up
    for thread in threads[1:]:
        thread.start()
    while batcher.waiting.qsize() < 3:
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join(10)
    assert results == {"1": [1.0, 2.0], "3": [3.0], "x": "failed", "4": [4.0, 5.0, 6.0]}
    assert batches == [2, 5, 1, 1, 3]


@pytest.mark.parametrize(("needs_reference", "keys"), [(False, {"src", "mt"}), (True, {"src", "mt", "ref"})])
def test_comet_models_get_the_columns_they_need(needs_reference: bool, keys: set[str], monkeypatch: Any) -> None:
    """Use a fake with the signatures of unbabel-comet 2.2; the models themselves do not run here."""
    seen: list[dict[str, str]] = []

    def predict(samples: Any, batch_size: int, gpus: int, num_workers: int, progress_bar: bool) -> Any:
        seen.extend(samples)
        return types.SimpleNamespace(scores=[0.25] * len(samples))

    model = types.SimpleNamespace(requires_references=lambda: needs_reference, predict=predict)
    comet = types.SimpleNamespace(download_model=lambda name: f"{name}.ckpt", load_from_checkpoint=lambda path: model)
    monkeypatch.setitem(sys.modules, "comet", comet)
    score_all = server_script().comet_scorer("some/model", 0, 4)
    assert score_all([{"src": "a", "mt": "b", "ref": "c"}] * 2) == [0.25, 0.25]
    assert set(seen[0]) == keys


@pytest.mark.parametrize("scores", [None, [1.0, 2.0], ["1"], [True], [None], [float("nan")]])
def test_scores_that_are_not_one_number_per_sample_are_an_error(scores: Any, monkeypatch: Any) -> None:
    async def post(self: Any, body: Any) -> dict[str, Any]:
        return {"scores": scores}

    monkeypatch.setattr(judge_http.Endpoint, "post", post)
    with pytest.raises(EndpointError, match="finite scores"):
        asyncio.run(metric_scores("http://127.0.0.1:1", [{"src": "a", "mt": "b", "ref": None}]))


# --- real sentence pairs ----------------------------------------------------------------------------------------------


@needs_langid
@pytest.mark.skipif(not PAIRS.is_dir(), reason="sentence pairs (../shared/data/translation) are not there")
@pytest.mark.parametrize(("file", "languages"), [("zh-en", ("zh", "en")), ("de-en", ("de", "en"))])
@pytest.mark.parametrize("forward", [True, False])
def test_on_real_pairs_the_reference_wins_a_copy_earns_nothing_and_a_shuffled_pair_little(
    file: str, languages: tuple[str, str], forward: bool
) -> None:
    rows = [json.loads(line) for line in (PAIRS / f"alma_valid.{file}.jsonl").read_text().splitlines()]
    rows = random.Random(SEED).sample(rows, 100)
    source, target = languages if forward else languages[::-1]

    async def reward(translation: str, row: dict[str, str], **options: Any) -> float:
        result = await translation_compare(
            f"<think>x</think>{translation}", row[source], source, target, reference=row[target], options=options
        )
        assert result.reward is not None
        return result.reward

    async def measure() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"reference": [], "copy": [], "both": [], "shuffled": [], "light": []}
        for i, row in enumerate(rows):
            chrf = {"mode": "metric", "metric": "chrf"}
            found["reference"].append(await reward(row[target], row, **chrf))
            found["copy"].append(await reward(row[source], row, **chrf))
            found["both"].append(await reward(f"{row[target]} {row[source]}", row, **chrf))
            found["shuffled"].append(await reward(rows[i - 1][target], row, **chrf))
            found["light"].append(await reward(row[target], row, mode="light"))
        return found

    found = {name: statistics.mean(values) for name, values in asyncio.run(measure()).items()}
    assert found["copy"] == 0 and found["both"] == 0
    assert found["reference"] >= 0.97 and found["light"] >= 0.97
    assert found["shuffled"] < 0.3
