"""4-bit normal floats and 8-bit dynamic codes from the published algorithms: make_nf4.py OUT_FILE

NF4 is appendix E of QLoRA (arXiv 2305.14314) as bitsandbytes' `functional.create_normal_map` writes it down, blocks of 64
by their largest magnitude, nearest code, two to a byte, the first in the upper half. Double quantisation is its
`quantize_blockwise` with `create_dynamic_map()` on the magnitudes less their mean, blocks of 256. Needs NumPy,
which the packages of `cargo xtask peers` bring along.
"""

import json
import sys

import numpy as np

# bitsandbytes' table: what create_normal_map gives, rounded to fp32 there.
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                0.7229568362236023, 1.0], dtype=np.float32)


def normal_map(offset=0.9677083):
    """create_normal_map: 8 quantiles over 0, 7 below, and 0 itself."""
    from statistics import NormalDist

    ppf = NormalDist().inv_cdf
    above = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array(above + [0.0] + below))
    return values / values.max()


def dynamic_map():
    """create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)."""
    data = []
    for i in range(7):
        boundaries = np.linspace(0.1, 1, 2**i + 1).astype(np.float32)
        means = ((boundaries[:-1] + boundaries[1:]) / np.float32(2)).astype(np.float64)
        data += list(10.0 ** (i - 6) * means) + list(-(10.0 ** (i - 6)) * means)
    return np.sort(np.array(data + [0.0, 1.0], dtype=np.float64)).astype(np.float32)


def nearest(values, codes):
    """Index of the nearest code by comparison with all of them."""
    return np.abs(values[..., None].astype(np.float64) - codes.astype(np.float64)).argmin(-1)


def in_blocks(values, size):
    return np.pad(values, (0, -len(values) % size)).reshape(-1, size)


def quantise(values, codes, size):
    blocks = in_blocks(values, size)
    scales = np.abs(blocks).max(1)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    return nearest(blocks * inverse[:, None], codes).reshape(-1)[:len(values)], scales


def dequantise(indices, scales, codes, size):
    return (in_blocks(codes[indices], size) * scales[:, None]).reshape(-1)[:len(indices)]


def case(rng, rows, columns):
    # Rows of very different size, so that the blocks' magnitudes use many of the 8-bit codes.
    matrix = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-3, 0, (rows, 1))
    values = matrix.astype(np.float32).reshape(-1)
    indices, scales = quantise(values, NF4, 64)
    padded = np.append(indices, 7) if len(indices) % 2 else indices
    dynamic, mean = dynamic_map(), scales.mean(dtype=np.float64).astype(np.float32)
    scale_indices, scale_scales = quantise(scales - mean, dynamic, 256)
    double = dequantise(scale_indices, scale_scales, dynamic, 256) + mean
    return {
        "rows": rows,
        "matrix": values.astype(float).tolist(),
        "codes": (padded[0::2] * 16 + padded[1::2]).tolist(),
        "values": dequantise(indices, scales, NF4, 64).astype(float).tolist(),
        "scale_codes": scale_indices.tolist(),
        "double_values": dequantise(indices, double, NF4, 64).astype(float).tolist(),
    }


def main():
    assert np.abs(normal_map() - NF4).max() < 1e-6, "the table is not that of the algorithm"
    rng = np.random.default_rng(0)
    cases = [case(rng, 6, 64), case(rng, 3, 43), case(rng, 80, 32)]
    golden = {"nf4": NF4.astype(float).tolist(), "dynamic": dynamic_map().astype(float).tolist(), "cases": cases}
    with open(sys.argv[1], "w") as file:
        json.dump(golden, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
