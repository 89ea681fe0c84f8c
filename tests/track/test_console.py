"""What is printed in each mode."""

from __future__ import annotations

import pytest

from llmrl.track.console import Console

METRICS = {"reward/mean": 0.51234, "reward/pass@1": 0.25, "policy/grad_norm": 1234.5, "rollout/num_tokens": 9.0}


def run(console: Console) -> None:
    console.say("hello [fn] list[int]")
    console.start("training", total=3, done=1)
    console.step(2, METRICS)
    console.step(3, {"time/step_s": 0.5})
    console.stop()


def test_plain_is_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    run(Console("plain"))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "hello [fn] list[int]",
        "training 2/3  reward 0.512  pass@1 0.25  grad 1.23e+03",
        "training 3/3  s/step 0.5",
    ]
    assert err == ""


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    text = "path/" * 100
    Console("plain").say(text)
    Console("quiet").warn(text)
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert err == f"warning: {text}\n"


@pytest.mark.parametrize("console", [Console("quiet"), Console("plain", enabled=False), Console("rich", enabled=False)])
def test_quiet_says_nothing_but_warnings(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    run(console)
    assert capsys.readouterr() == ("", "")
    console.warn("look here")
    assert capsys.readouterr() == ("", "warning: look here\n")


def test_a_warnings_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "rewards[0].fn returns list[int], see [fn] and [/closing] [red]"
    Console("plain").warn(text)
    assert capsys.readouterr().err == f"warning: {text}\n"


def test_auto_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert Console("auto").mode == "plain"


def test_rich_shows_the_steps_and_ends_cleanly(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("rich")
    run(console)
    out = capsys.readouterr().out
    assert "training" in out
    assert "3/3" in out
    console.stop()  # twice is fine
