"""Results of `hopeprobe analyze --format json` to one table, a line a row and checkpoint.

    python gather.py tiny:0=tiny-0.json tiny:1=tiny-1.json … --out rows.csv

Each argument is SIZE:SEED=FILE. A checkpoint may have several files, say one of its passes and one of the sample; of a
row that more than one has, the first counts. The table is what `gates.ipynb` reads; `random` says whether a rule beats
a random gate in that checkpoint, at a false discovery rate of 5 % over all differences of its file.
"""

import argparse
from pathlib import Path

import pandas as pd

from hopeprobe.files import write_atomically
from hopeprobe.probes.relative_surprise import BEATS, LOSES, NOT_TOLD
from hopeprobe.results import Results

KEY = ["statistic", "condition", "component", "position"]
COLUMNS = [*KEY, "value", "ci_low", "ci_high", "verdict"]


def rows_of(size: str, seed: int, results: Results) -> pd.DataFrame:
    """Rows of one checkpoint, their nulls beside them."""
    nulls = results.nulls_by_row()
    table = results.table[COLUMNS].copy()
    for kind in ("own-init", "fresh-init"):
        table[kind] = [
            nulls.get(row.key, {})[kind].value if kind in nulls.get(row.key, {}) else None
            for row in results.rows
        ]
    table["random"] = [
        next((call for call in (BEATS, LOSES, NOT_TOLD) if call in row.note), "") for row in results.rows
    ]
    table.insert(0, "size", size)
    table.insert(1, "seed", seed)
    return table


def main() -> None:
    """Read, join, write."""
    parser = argparse.ArgumentParser(description="Join results of several checkpoints.")
    parser.add_argument("files", nargs="+", metavar="SIZE:SEED=FILE")
    parser.add_argument("--out", type=Path, default=Path("rows.csv"))
    given = parser.parse_args()
    tables = []
    for each in given.files:
        named, _, file = each.partition("=")
        size, _, seed = named.partition(":")
        tables.append(rows_of(size, int(seed), Results.from_json(Path(file).read_text(encoding="utf-8"))))
    joined = pd.concat(tables).drop_duplicates(["size", "seed", *KEY])
    text = joined.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_atomically(given.out, text.encode())
    print(f"{given.out}: {len(joined)} rows of {len(joined.groupby(['size', 'seed']))} checkpoints")


if __name__ == "__main__":
    main()
