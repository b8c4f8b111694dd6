"""Writes numpy.json: permutations of NumPy's default_rng, and the rows that `datasets` picks by shuffle and select.

Run: python make_numpy.py      (needs numpy, datasets, xxhash; the file here was made with numpy 2.4.6, datasets 5.2.0)

`first` are the first indices; `xxh3` is the XXH3-64 of all as little-endian 32-bit integers.
"""
import json
import os

import datasets
import numpy as np
import xxhash

SEEDS = [0, 1, 42, 1234567, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]
LENGTHS = [0, 1, 2, 3, 10, 1000, 65537]
# The last is Jiayi-Pan/Countdown-Tasks-3to4, as recipes pick from it.
PICKS = [(42, 10, 10), (42, 1000, 100), (7, 12345, 12345), (42, 490364, 50000)]


def digest(indices):
    return xxhash.xxh3_64(np.asarray(indices, dtype="<u4").tobytes()).hexdigest()


def permutation(seed, length):
    order = np.random.default_rng(seed).permutation(length)
    return {"seed": seed, "len": length, "first": order[:8].tolist(), "xxh3": digest(order)}


def pick(seed, length, take):
    rows = datasets.Dataset.from_dict({"row": range(length)}).shuffle(seed=seed).select(range(take))
    return {"seed": seed, "len": length, "take": take, "xxh3": digest(rows["row"][:])}


def main():
    golden = {"permutations": [permutation(seed, length) for seed in SEEDS for length in LENGTHS],
              "datasets": [pick(*case) for case in PICKS]}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "numpy.json"), "w") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")


main()
