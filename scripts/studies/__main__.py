"""Command line of `scripts/study_presets` and `scripts/study_receipts`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="study", required=True)
    bandit_options = commands.add_parser("bandit", help="compare mechanisms on a tabular bandit")
    bandit_options.add_argument("--seeds", type=int, default=10)
    bandit_options.add_argument("--json", type=Path)
    additions_options = commands.add_parser("additions", help="compare presets on additions, at equal tokens")
    additions_options.add_argument("--seeds", type=int, default=5)
    additions_options.add_argument("--folder", type=Path, default=Path("runs/study_additions"))
    table_options = commands.add_parser("table", help="print the table of stored additions runs")
    table_options.add_argument("file", type=Path)
    commands.add_parser("thr_cost", help="cost of Token Hidden Reward in an update")
    receipts_options = commands.add_parser("receipts", help="the shipped recipe on a pretrained model")
    receipts_options.add_argument("model", type=Path, help="folder of SmolLM2-135M-Instruct")
    receipts_options.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl of GSM8K")
    receipts_options.add_argument("--folder", type=Path, default=Path("runs/study_receipts"))
    families_options = commands.add_parser("families", help="random models of several families")
    families_options.add_argument("--folder", type=Path, default=Path("runs/study_families"))
    given = parser.parse_args()
    if given.study == "bandit":
        from studies import bandit

        bandit.main(given.seeds, given.json)
    elif given.study == "additions":
        from studies import additions, tables

        additions.main(given.folder, given.seeds)
        tables.show_additions(given.folder / "additions.jsonl")
    elif given.study == "thr_cost":
        from studies import thr_cost

        thr_cost.main()
    elif given.study == "receipts":
        from studies import receipts

        receipts.main(given.model, given.data, given.folder)
    elif given.study == "families":
        from studies import families

        families.main(given.folder)
    else:
        from studies import tables

        tables.show_additions(given.file)


if __name__ == "__main__":
    main()
