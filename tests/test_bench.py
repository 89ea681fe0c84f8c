"""scripts/bench: the arithmetic of the harness on made-up measurements, its command line, and one real case."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import common, grpo, verify, workloads  # noqa: E402

from llmrl.errors import UserError  # noqa: E402


def measurement(cpu: float, wall: float, memory: float) -> dict[str, float]:
    return {"cpu_s": cpu, "wall_s": wall, "memory_mb": memory}


def test_ratios_are_rival_over_ours_and_made_of_medians():
    ours = [measurement(1.0, 2.0, 100.0), measurement(9.0, 2.5, 100.0), measurement(1.2, 2.25, 130.0)]
    theirs = [measurement(3.0, 9.0, 50.0), measurement(2.4, 9.0, 50.0), measurement(0.1, 9.0, 51.0)]
    found = common.summarize("case", "someone", ours, theirs)
    assert (found["name"], found["rival"]) == ("case", "someone")
    assert found["ratio_cpu"] == pytest.approx(2.4 / 1.2)
    assert found["ratio_wall"] == pytest.approx(9.0 / 2.25)
    assert found["ratio_memory"] == pytest.approx(0.5)
    assert (found["ours_cpu_s"], found["rival_cpu_s"]) == (1.2, 2.4)
    assert found["measurements"] == {"ours": ours, "rival": theirs}


def test_compare_measures_in_turn_and_alternates_who_begins():
    calls = []

    def run(side: str, repetition: int) -> dict[str, float]:
        calls.append((side, repetition))
        return measurement(1.0 if side == "ours" else 3.0, 1.0, 1.0)

    assert common.compare("case", "someone", run, repetitions=3)["ratio_cpu"] == 3.0
    assert calls == [("ours", 0), ("rival", 0), ("rival", 1), ("ours", 1), ("ours", 2), ("rival", 2)]


def test_meter_means_leave_out_the_first_steps(monkeypatch):
    meter = common.Meter()
    meter.marks = [(0.0, 0.0), (50.0, 60.0), (51.0, 62.0), (54.0, 64.0)]
    monkeypatch.setattr(common, "status_mb", lambda key: {"VmHWM": 300.0, "VmRSS": 1.0}[key])
    monkeypatch.setattr(common, "children_mb", lambda: 5.0)
    meter.start_mb = 180.0
    report = meter.report(skip=1)
    assert report == {"cpu_s": 2.0, "wall_s": 2.0, "memory_mb": 125.0, "step_cpu_s": [1.0, 3.0]}
    with pytest.raises(ValueError, match="too few"):
        meter.report(skip=3)


def test_cpu_seconds_counts_children_while_they_live_and_afterwards():
    before = common.cpu_seconds()
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", busy], **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        assert common.cpu_seconds() - before >= 0.45
        child.communicate("\n")
    assert common.cpu_seconds() - before >= 0.45


def test_meter_sees_memory_that_was_given_back():
    meter = common.Meter()
    meter.start()
    block = bytearray(64 * 2**20)
    del block
    meter.mark()
    meter.mark()
    assert 60 <= meter.report(skip=0)["memory_mb"] <= 250  # other tests of this process leave memory in use


def test_matmul_rate_is_that_of_the_fastest_product(monkeypatch):
    seconds = [0.5, 0.25, 2.0, *[1.0] * 9]
    clock = itertools.accumulate(itertools.chain.from_iterable([0.0, lasts] for lasts in seconds))
    monkeypatch.setattr(common.time, "process_time", lambda: next(clock))
    assert common.matmul_rate() == 2 * 768**3 / 0.25


def test_forward_operations_by_hand():
    shape = {
        "num_prompts": 2,
        "num_generations": 3,
        "prompt_length": 10,
        "linear_parameters": 1000,
        "num_layers": 2,
        "hidden_size": 8,
        "vocab_size": 50,
    }
    # 2 prompts of 10 tokens once, 6 completions of 4 tokens; a completion token sees 10 + 4 / 2 others on average.
    linear, head, attention = 2 * 1000 * (20 + 24), 2 * 50 * 8 * 24, 4 * 2 * 8 * (20 * 5 + 24 * 12)
    assert grpo.forward_operations(shape, 24) == linear + head + attention


def test_endless_tokenizer_has_one_token_per_character_and_an_eos_the_model_cannot_sample(tmp_path):
    workloads.endless_tokenizer(300).save_pretrained(tmp_path)
    tokenizer = workloads.load_tokenizer(tmp_path)
    ids = tokenizer(workloads.ALPHABET)["input_ids"]
    assert sorted(ids) == list(range(len(workloads.ALPHABET)))
    assert tokenizer.decode(ids) == workloads.ALPHABET
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 300
    shares = [workloads.digit_share(tokenizer.decode([token])) for token in range(len(workloads.ALPHABET), 300)]
    assert set(shares) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [(["--suite", "nonsense"], "grpo"), (["--suite", "grpo", "--case", "nonsense"], "quickstart_16+32")],
)
def test_unknown_names_exit_2_with_the_list(arguments, listed):
    with pytest.raises(UserError, match="no such") as found:
        command.main(arguments)
    assert listed in str(found.value)
    assert found.value.exit_code == 2


def test_report_is_written_and_shown(monkeypatch, tmp_path, capsys):
    entry = common.summarize("natural", "someone", [measurement(1, 1, 1)], [measurement(2, 3, 4)])
    monkeypatch.setattr(grpo, "run", lambda cases, repetitions: [entry] if cases == ["natural"] else [])
    file = tmp_path / "new" / "report.json"
    command.main(["--suite", "grpo", "--case", "natural", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["machine"]["cores"] >= 1
    assert report["cases"] == [entry]
    assert "natural" in capsys.readouterr().out


def test_sides_of_verify_that_disagree_are_refused(monkeypatch):
    def measure(module: str, side: str, name: str, seed: str) -> dict[str, object]:
        return measurement(1.0, 1.0, 1.0) | {"verdicts": [True, side == "ours" or seed == "0"]}

    monkeypatch.setattr(verify, "measure", measure)
    assert verify.run(["math_answers"], 1)[0]["rival"] == "plain math-verify calls in one process"
    with pytest.raises(RuntimeError, match="math_answers: the two sides do not give the same verdicts"):
        verify.run(["math_answers"], 2)


def test_programs_of_verify_are_right_but_for_every_fourth():
    for index, (program, checks) in enumerate(verify.programs()):
        names: dict[str, object] = {}
        exec("\n".join([program, *checks[:2]]), names)
        if index % 4 == 3:
            with pytest.raises(AssertionError):
                exec(checks[2], names)
        else:
            exec(checks[2], names)


@pytest.mark.slow
def test_pool_and_plain_calls_judge_alike_and_workers_count(monkeypatch):
    monkeypatch.setattr(verify, "NUM_QUESTIONS", 8)
    compare = verify.math_answers(warm_rounds=1)
    ours, plain = compare(True, 1), compare(False, 1)
    assert ours["verdicts"] == plain["verdicts"]
    assert {True, False} == set(ours["verdicts"])
    assert ours["items"] == 8 * verify.ANSWERS_PER_QUESTION
    assert min(ours["cpu_s"], ours["wall_s"], plain["cpu_s"], plain["wall_s"]) > 0


@pytest.mark.slow
def test_both_sides_do_the_same_work_on_a_real_case(monkeypatch):
    (found,) = grpo.run(["quickstart_16+32"], 1)
    assert min(found[f"ratio_{ratio}"] for ratio in common.MEASURED) > 0
    assert 0 < found["floor_cpu_s"] < found["ours_cpu_s"]
    ours, rival = found["equal_work"]["ours"], found["equal_work"]["rival"]
    assert ours["tokens_per_step"] == rival["tokens_per_step"] == 16 * 8 * 32
    assert abs(ours["loss"]) < 1e-6  # on policy and of equal length, advantages cancel
    assert abs(rival["loss"]) < 1e-6
    assert ours["grad_norm"] == pytest.approx(rival["grad_norm"], rel=0.2)
    for side in (ours, rival):
        assert side["reward_last"] > side["reward_first"] + 0.05
    assert ours["reward_last"] == pytest.approx(rival["reward_last"], abs=0.15)
