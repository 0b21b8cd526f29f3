"""MNIST, 784-10-10-10: each method at its own best learning rate.

    python examples/benchmarks/mnist.py            # the table of the README
    python examples/benchmarks/mnist.py --quick

All methods get the same initial replicas and batches. The learning rate of each is
chosen by the mean training loss on other seeds than those of the table.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flax_mnist import MLP, Mnist, load_mnist, make_optimizer, train
from quickstart import interval

METHODS = ("Adam", "Adam, normalised gradients", "pranam + Adam")
LEARNING_RATES = (3e-3, 6e-3, 1e-2, 1.5e-2, 2e-2)


def run(
    data: Mnist, method: str, rate: float, seed: int, num_steps: int
) -> list[float]:
    """Mean and best train loss; mean test accuracy, that of the best; seconds."""
    trained = train(
        MLP((10, 10)),
        data,
        make_optimizer(method, rate, num_steps),
        num_replicas=16,
        num_steps=num_steps,
        batch_size=128,
        seed=seed,
        description=f"{method}, rate {rate:g}, seed {seed}",
    )
    loss, accuracy = trained.train_loss, trained.test_accuracy
    best = int(np.nanargmin(loss))
    return [
        float(x) for x in (loss.mean(), loss[best], accuracy.mean(), accuracy[best])
    ] + [trained.seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, help="write all runs as JSON")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    num_steps = 60 if args.quick else 2000
    rates = (1e-2,) if args.quick else LEARNING_RATES
    tuning, report = (
        (range(1), range(100, 102))
        if args.quick
        else (
            range(1, 5),
            range(100, 105),
        )
    )

    data = load_mnist(args.data_dir)
    lines = [
        "| method | learning rate | train loss, mean (95 % interval) | best "
        "| test accuracy, mean | of the best | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs: dict[str, dict[str, list[list[float]]]] = {}
    for method in METHODS:
        tuned = {
            rate: [run(data, method, rate, seed, num_steps) for seed in tuning]
            for rate in rates
        }
        rate = min(tuned, key=lambda rate: np.mean([r[0] for r in tuned[rate]]))
        reported = [run(data, method, rate, seed, num_steps) for seed in report]
        runs[method] = {f"{r:g}": v for r, v in tuned.items()} | {"report": reported}
        loss, best, accuracy, best_accuracy, _ = np.transpose(reported)
        # The fastest of all runs: what else the machine does only adds time.
        seconds = min(r[-1] for runs_ in [reported, *tuned.values()] for r in runs_)
        low, high = interval(loss)
        lines.append(
            f"| {method} | {rate:g} | {loss.mean():.4f} ({low:.4f} to {high:.4f}) "
            f"| {best.mean():.4f} | {accuracy.mean():.4f} | {best_accuracy.mean():.4f} "
            f"| {seconds:.1f} s |"
        )
    print("\n".join(lines))
    if args.output:
        args.output.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
