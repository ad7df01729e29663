"""Sum up runs of one example that differ by their seed: mean ± standard deviation.

python examples/summary.py runs/simclr-0 runs/simclr-1 runs/simclr-2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

from records import with_spread
from rich.console import Console

from recon_aux.probe import COMBINED, ProbeResult, markdown_table


def main(folders: list[str]) -> None:
    """Print a table with a row for each part of each encoder."""
    if not folders:
        raise SystemExit("expected folders that examples wrote, got none; see --out")
    runs = []
    for folder in folders:
        path = Path(folder) / "results.json"
        if not path.is_file():
            raise SystemExit(f"expected a run's output folder, {folder} has no results.json")
        record = json.loads(path.read_text())
        runs.append({arm: ProbeResult.from_dict(r) for arm, r in record["results"].items()})
        print(f"{folder}: {record['command']}, {record['seconds']} s")

    table = markdown_table(["linear %", "k-NN %", "mean R²", *COMBINED])
    for arm, result in runs[0].items():
        for part in result.parts:
            found = [run[arm].parts[part] for run in runs]
            table.add_row(
                f"{arm} {part}",
                with_spread([p.linear for p in found], 1),
                with_spread([p.knn for p in found], 1),
                with_spread([p.mean_combined for p in found], 3),
                *(f"{mean(p.combined[name] for p in found):.2f}" for name in COMBINED),
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
