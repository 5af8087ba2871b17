"""Makes mnist-mini/ from the original MNIST files: python make_mnist_mini.py FOLDER, where FOLDER holds the four idx.gz files.

400 training and 100 test images a class, chosen and shuffled by numpy's PCG64 at seed 20241; the same bytes every time.
"""

import sys
from pathlib import Path

import numpy as np

from subnet_pipelines.benchmarks.idx import read_idx, write_idx

SEED = 20241


def main(source: Path, target: Path) -> None:
    """Write the four files of the subset of the idx.gz files in `source` into `target`."""
    target.mkdir(exist_ok=True)
    for number, (half, each) in enumerate((("train", 400), ("t10k", 100))):
        names = f"{half}-images-idx3-ubyte.gz", f"{half}-labels-idx1-ubyte.gz"
        images, labels = read_idx(source / names[0], 3).numpy(), read_idx(source / names[1], 1).numpy()
        chance = np.random.Generator(np.random.PCG64([SEED, number]))
        chosen = np.concatenate([chance.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(10)])
        chosen = chance.permutation(chosen)
        write_idx(target / names[0], images[chosen])
        write_idx(target / names[1], labels[chosen])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent / "mnist-mini")
