"""Reward files that import the files beside them: at load and in a call, here and in worker processes."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.plugin import load_file
from llmrl.verify.rubric import Rubric
from llmrl.verify.spec import resolve
from tests.verify.rollouts import group, rollout


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_file_imports_the_files_and_packages_beside_it(tmp_path: Path) -> None:
    before = list(sys.path)
    write(tmp_path / "helpers.py", "import deeper\ndef score(t): return deeper.FACTOR * len(t)\n")
    write(tmp_path / "deeper.py", "FACTOR = 2.0\n")
    write(tmp_path / "pack" / "__init__.py", "from pack.inner import ONE\n")
    write(tmp_path / "pack" / "inner.py", "from helpers import score\nimport deeper\nONE = 1.0\n")
    write(tmp_path / "spread" / "part.py", "TEN = 10.0\n")
    file = write(
        tmp_path / "mine.py",
        "from helpers import score\nimport pack.inner\nimport pack.inner as inner\nfrom pack import ONE\n"
        "import spread.part\nfrom spread import part\nfrom . import deeper\nfrom .pack.inner import ONE as SAME\n"
        "def mine(completion):\n"
        "    assert inner is pack.inner and part is spread.part and inner.deeper is deeper\n"
        "    return score(completion) + pack.inner.ONE + ONE + SAME + part.TEN\n",
    )
    assert resolve(str(file))(completion="abc") == 6.0 + 3.0 + 10.0
    assert sys.path == before
    assert not {"helpers", "deeper", "pack", "spread"} & set(sys.modules)


def test_two_folders_with_the_same_names_do_not_mix(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(tmp_path / name / "helpers.py", f"VALUE = {value}\n")
        write(tmp_path / name / "lazy.py", f"VALUE = {value * 10}\n")
        write(
            tmp_path / name / "mine.py",
            "from helpers import VALUE\ndef mine(completion):\n    import lazy\n    return VALUE + lazy.VALUE\n",
        )
    functions = [resolve(str(tmp_path / name / "mine.py")) for name in ("one", "two")]
    found: list[list[float]] = [[], []]

    def call(i: int) -> None:
        found[i] += [functions[i](completion="") for _ in range(200)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[11.0] * 200, [22.0] * 200]


def test_nothing_is_hidden_and_nothing_exists_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "math.py", "import math\nfrom json import dumps\ndef math_pi(completion): return math.pi\n")
    write(tmp_path / "json.py", "raise RuntimeError('the standard library comes first')\n")
    write(tmp_path / "llmrl" / "__init__.py", "raise RuntimeError('a clone of the project')\n")
    write(tmp_path / "numpy" / "readme.py", "raise RuntimeError('a folder without __init__.py comes last')\n")
    write(tmp_path / "yaml.py", "import yaml\nfrom llmrl.types import Score\nimport numpy\nSAFE = yaml.safe_load\n")
    file = write(tmp_path / "mine.py", "from yaml import SAFE, Score, numpy\ndef mine(completion): return Score\n")
    assert resolve(f"{tmp_path / 'math.py'}:math_pi")(completion="") == math.pi
    assert resolve(str(file))(completion="") is Score
    module = load_file(file)
    import numpy
    import yaml

    assert module.numpy is numpy
    assert module.SAFE is yaml.safe_load, "yaml.py imports the installed yaml, mine.py its neighbor"
    # A folder on the search path: its modules are the ones that everything else imports.
    monkeypatch.syspath_prepend(tmp_path / "path")
    write(tmp_path / "path" / "shared_state.py", "COUNT = []\n")
    other = write(
        tmp_path / "path" / "user.py", "import shared_state\ndef user(completion): return shared_state.COUNT\n"
    )
    import shared_state  # type: ignore[import-not-found]

    assert resolve(str(other))(completion="") is shared_state.COUNT
    monkeypatch.delitem(sys.modules, "shared_state")


def test_rewards_of_one_folder_share_their_modules(tmp_path: Path) -> None:
    write(tmp_path / "base.py", "SEEN = []\ndef base(completion): return float(len(SEEN))\n")
    file = write(tmp_path / "top.py", "import base\ndef top(completion): base.SEEN.append(1); return 1.0\n")
    resolve(str(file))(completion="")
    assert resolve(str(tmp_path / "base.py"))(completion="") == 1.0


def test_files_with_other_names_load(tmp_path: Path) -> None:
    write(tmp_path / "helpers.py", "V = 1.0\n")
    for name in ("my-reward.py", "my_reward.py", "reward.v2.py", "3.py"):
        file = write(tmp_path / name, f"from helpers import V\nNAME = {name!r}\ndef f(completion): return NAME\n")
        assert resolve(f"{file}:f")(completion="") == name


def test_neighbors_in_a_worker_process(tmp_path: Path) -> None:
    write(tmp_path / "helpers.py", "def score(t): return float(len(t))\n")
    write(tmp_path / "lazy.py", "class Detail:\n    def __eq__(self, other): return True\n")
    file = write(
        tmp_path / "pooled.py",
        "from llmrl.types import Score\nfrom helpers import score\nPOOL = True\ndef pooled(completion):\n"
        "    from lazy import Detail\n    return Score(reward=score(completion), info={'detail': Detail()})\n",
    )

    async def main() -> Any:
        rubric = Rubric([str(file)])
        try:
            found = rollout("abcd")
            await rubric.score_group(group(found))
            return found.score
        finally:
            await rubric.close()

    score = asyncio.run(main())
    assert score.error is None
    assert score.reward == 4.0
    assert type(score.info["pooled"]["detail"]).__name__ == "Detail", "its module is found in this process too"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1\nimport helper\n",
            "line 2: importing it failed: ModuleNotFoundError(\"No module named 'helper'\"). Did you mean 'helpers'",
        ),
        (
            "import helpers.missing\n",
            "line 1: importing it failed: ModuleNotFoundError(\"No module named 'helpers.missing'",
        ),
        ("import bad\n", "line 1: importing it failed: ValueError('inside')"),
        ("\nimport worse\n", "line 2: importing it failed: SyntaxError"),
        ("W = open('words.txt').read()\n", "open Path(__file__).parent / 'words.txt'"),
    ],
)
def test_errors_name_the_line_and_the_fix(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "helpers.py", "")
    write(tmp_path / "bad.py", "raise ValueError('inside')\n")
    write(tmp_path / "worse.py", "def f(:\n")
    write(tmp_path / "words.txt", "")
    file = write(tmp_path / "mine.py", text)
    with pytest.raises(UserError) as caught:
        load_file(file)
    assert message in str(caught.value)
    assert "llmrl_plugin" not in str(caught.value)


def test_a_changed_file_or_neighbor_is_loaded_again(tmp_path: Path) -> None:
    write(tmp_path / "helpers.py", "V = 1.0\n")
    write(tmp_path / "spread" / "part.py", "TEN = 10.0\n")
    file = write(tmp_path / "mine.py", "from helpers import V\nimport spread.part\ndef mine(completion): return V\n")
    first = resolve(str(file))
    assert resolve(str(file)) is first
    write(tmp_path / "helpers.py", "V = 1.0 + 1\n")
    second = resolve(str(file))
    assert (first(completion=""), second(completion="")) == (1.0, 2.0)
    write(file, "from helpers import V\ndef mine(completion): return V + 10\n")
    assert resolve(str(file))(completion="") == 12.0
