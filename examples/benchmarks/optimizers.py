"""pranam and reparametrize against independent replicas, under four optimizers.

    python examples/benchmarks/optimizers.py   # the table of docs/original.md
    python examples/benchmarks/optimizers.py --quick

These are cells of the study (study.py) and share its output file: what is there
already is not computed again.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import report
import study
from stats import bootstrap_interval
from tasks import make_tasks

PROBLEMS = (
    "Schwefel 30 rotated",
    "Ackley 30 rotated",
    "Rastrigin 30 rotated",
    "Levy 30 rotated",
    "polynomial",
    "MNIST 10-10",
)
OPTIMIZERS = ("SGD", "Adagrad", "RMSProp", "Adam")
METHODS = ("independent", "normalised", "reparametrize", "pranam")


def table(cells: report.Cells) -> str:
    """One row per problem and optimizer: mean over replicas (interval) / best.

    The lowest mean is bold.
    """
    rows = []
    for problem, optimizer in dict.fromkeys((p, o) for p, o, _ in cells):
        found = [cells[problem, optimizer, method] for method in METHODS]
        lowest = min(cell.mean.mean() for cell in found)
        row = [problem, optimizer]
        for cell in found:
            diverged = int(np.sum(~np.isfinite(cell.mean)))
            if diverged:
                text = f"diverged in {diverged} of {len(cell.mean)} runs"
            else:
                low, high = bootstrap_interval(cell.mean)
                text = f"{cell.mean.mean():.3g} ({low:.3g} to {high:.3g})"
            if cell.mean.mean() == lowest:
                text = f"**{text}**"
            row.append(f"{text} / {report.number(cell.best.mean())}")
        rows.append(row)
    return report.lines_of(("problem", "optimizer", *METHODS), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the files of MNIST")
    parser.add_argument("--output", type=Path, help="default study.json")
    parser.add_argument("--quick", action="store_true", help="small, to try the code")
    args = parser.parse_args()

    makers = make_tasks(args.data_dir)
    output = "optimizers_quick.json" if args.quick else "study.json"
    problems = ("Ackley 10 rotated",) if args.quick else PROBLEMS
    optimizers = ("Adam",) if args.quick else OPTIMIZERS
    results = study.study(
        {name: makers[name] for name in problems},
        optimizers,
        METHODS,
        study.QUICK if args.quick else study.Setting(),
        args.output or Path(output),
    )
    cells = report.read(results)
    wanted = {key: cells[key] for key in product(problems, optimizers, METHODS)}
    print(table(wanted))


if __name__ == "__main__":
    main()
