"""Copies what the tests need of the full reference trajectories.

python tests/reference/shrink.py FOLDER_WITH_THE_FULL_NPZ_FILES
"""

import pathlib
import sys

import numpy as np

# Compared one step at a time, so that every state of the embedding is needed.
CHAOTIC = (
    "schwefel_sgd",
    "schwefel_momentum",
    "schwefel_adagrad",
    "softsign_sgd",
    "deep_adam",
)
EVERY = 6  # rows of the embedding that are kept of the others


def shrink(source: pathlib.Path, folder: pathlib.Path) -> None:
    with np.load(source) as full:
        small = {}
        for name, array in full.items():
            if name.startswith("FCEmbed_"):
                every = 1 if source.stem in CHAOTIC else EVERY
                rows = sorted({*range(0, len(array), every), len(array) - 1})
                small[name], small["rows"] = array[rows], np.array(rows, np.int32)
            elif name.startswith("clone_") or name in ("loss", "scale", "x", "y"):
                small[name] = array
    np.savez_compressed(folder / source.name, **small)


if __name__ == "__main__":
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.npz")):
        shrink(path, pathlib.Path(__file__).parent)
