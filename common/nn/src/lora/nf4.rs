//! 4-bit normal floats (QLoRA, arXiv 2305.14314), laid out and rounded as bitsandbytes does.
//!
//! A matrix is cut into blocks of 64 elements in row-major order. A block is stored as its largest magnitude and, of each
//! element divided by that, the nearest of 16 codes, two to a byte, the earlier one in the upper half. Double quantisation
//! stores the blocks' magnitudes, less their mean, in 8 bits: in blocks of 256, by codes whose steps grow with magnitude
//! (arXiv 1511.04561).

use tch::{Device, Kind, Tensor};

const BLOCK: i64 = 64;
/// Blocks of magnitudes.
const SCALE_BLOCK: i64 = 256;

/// Quantiles of the normal distribution, from -1 to 1 with an exact 0: bitsandbytes' table.
#[expect(clippy::excessive_precision, reason = "as published")]
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

/// How a matrix is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nf4Options {
    pub double_quant: bool,
}

/// A matrix in 4 bits.
#[derive(Debug)]
pub struct Nf4Matrix {
    shape: Vec<i64>,
    /// Two codes a byte, `[ceil(numel / 2)]`, u8.
    codes: Tensor,
    scales: Scales,
}

/// The largest magnitude of every block.
#[derive(Debug)]
enum Scales {
    /// `[blocks]`, fp32.
    Exact(Tensor),
    /// Indices into the dynamic codes, `[blocks]`, u8; the largest magnitude of every block of them, fp32; their mean.
    Quantised { codes: Tensor, scales: Tensor, mean: f64 },
}

impl Nf4Matrix {
    /// Rounds a matrix, on its device; the computation is in fp32.
    #[must_use]
    pub fn quantise(matrix: &Tensor, options: Nf4Options) -> Self {
        let values = matrix.detach().to_kind(Kind::Float).reshape([-1]);
        let blocks = in_blocks(&values, BLOCK); // [blocks, 64]
        let scales = blocks.abs().amax([1], false); // [blocks]
        let unit = (&blocks * inverse(&scales).unsqueeze(1)).contiguous();
        let codes = nearest_code(&unit, &Tensor::from_slice(&NF4).to_device(matrix.device()));
        let codes = codes.reshape([-1]).narrow(0, 0, (values.numel() as i64 + 1) / 2 * 2).view([-1, 2]);
        let packed = codes.select(1, 0) * 16 + codes.select(1, 1); // [ceil(numel / 2)]
        let scales = if options.double_quant { Scales::quantise(&scales) } else { Scales::Exact(scales) };
        Self { shape: matrix.size(), codes: packed.to_kind(Kind::Uint8), scales }
    }

    /// The matrix again, of type `kind`.
    pub fn dequantise(&self, kind: Kind) -> Tensor {
        let device = self.codes.device();
        // Of every byte, both values.
        let pairs: Vec<f32> = (0..256).flat_map(|byte| [NF4[byte >> 4], NF4[byte & 15]]).collect();
        let pairs = Tensor::from_slice(&pairs).view([256, 2]).to_device(device);
        let unit = pairs.index_select(0, &self.codes.to_kind(Kind::Int)).view([-1]); // [numel, or one more]
        let values = in_blocks(&unit, BLOCK) * self.scales.values().unsqueeze(1); // [blocks, 64]
        let numel = self.shape.iter().product();
        values.view([-1]).narrow(0, 0, numel).to_kind(kind).view(self.shape.as_slice())
    }

    /// Bytes that a matrix of so many elements takes.
    #[must_use]
    pub fn bytes_of(numel: usize, options: Nf4Options) -> usize {
        let blocks = numel.div_ceil(BLOCK as usize);
        let scales = if options.double_quant { blocks + 4 * blocks.div_ceil(SCALE_BLOCK as usize) } else { 4 * blocks };
        numel.div_ceil(2) + scales
    }

    /// Bytes in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Exact(scales) => 4 * scales.numel(),
            Scales::Quantised { codes, scales, .. } => codes.numel() + 4 * scales.numel(),
        };
        self.codes.numel() + scales
    }
}

impl Scales {
    fn quantise(scales: &Tensor) -> Self {
        let mean = scales.mean(Kind::Float).double_value(&[]);
        let blocks = in_blocks(&(scales - mean), SCALE_BLOCK); // [blocks / 256, 256]
        let largest = blocks.abs().amax([1], false);
        let unit = (blocks * inverse(&largest).unsqueeze(1)).contiguous();
        let codes = nearest_code(&unit, &dynamic_codes(scales.device()));
        let codes = codes.reshape([-1]).narrow(0, 0, scales.numel() as i64).to_kind(Kind::Uint8);
        Self::Quantised { codes, scales: largest, mean }
    }

    /// `[blocks]`, fp32.
    fn values(&self) -> Tensor {
        match self {
            Self::Exact(scales) => scales.shallow_clone(),
            Self::Quantised { codes, scales, mean } => {
                let unit = dynamic_codes(codes.device()).index_select(0, &codes.to_kind(Kind::Int));
                let values = in_blocks(&unit, SCALE_BLOCK) * scales.unsqueeze(1) + *mean;
                values.view([-1]).narrow(0, 0, codes.numel() as i64)
            }
        }
    }
}

/// 256 codes from near -1 to 1: for each power of ten down to 1e-6, as many as are left bits, evenly spaced (8-bit dynamic
/// tree quantisation with 7 exponents).
fn dynamic_codes(device: Device) -> Tensor {
    let mut codes = vec![0.0, 1.0];
    for exponent in 0..7 {
        let num_steps = 1 << exponent;
        let step = 0.9_f32 / num_steps as f32;
        let bound = |index: i32| (0.1 + step * index as f32).min(1.0);
        for index in 0..num_steps {
            let mean = f64::from((bound(index) + bound(index + 1)) / 2.0);
            let code = (10.0_f64.powi(exponent - 6) * mean) as f32;
            codes.extend([code, -code]);
        }
    }
    codes.sort_by(f32::total_cmp);
    Tensor::from_slice(&codes).to_device(device)
}

/// Index of the nearest of ascending `codes` for each of `values`, the lower of two that are as near; same shape, i64.
fn nearest_code(values: &Tensor, codes: &Tensor) -> Tensor {
    let num_codes = codes.size()[0];
    let bounds = (codes.narrow(0, 0, num_codes - 1) + codes.narrow(0, 1, num_codes - 1)) / 2.0;
    values.bucketize(&bounds, false, false)
}

/// `1 / x`, and 0 where x is 0.
fn inverse(x: &Tensor) -> Tensor {
    x.reciprocal().where_self(&x.gt(0.0), &x.zeros_like())
}

/// Rows of `block` elements, the last one filled up with 0.
fn in_blocks(values: &Tensor, block: i64) -> Tensor {
    let missing = (block - values.numel() as i64 % block) % block;
    if missing == 0 {
        return values.view([-1, block]);
    }
    let filler = Tensor::zeros([missing], (values.kind(), values.device()));
    Tensor::cat(&[values, &filler], 0).view([-1, block])
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn numbers(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        Vec::try_from(tensor).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// What `tests/golden/make_nf4.py` computes from the published algorithm.
    #[test]
    fn codes_and_values_are_those_of_the_published_algorithm() {
        let golden = include_str!("../../../../tests/golden/nf4.json");
        let golden: Value = serde_json::from_str(golden).unwrap();
        assert_eq!(numbers(&golden["nf4"]), NF4);
        let dynamic = Tensor::from_slice(&numbers(&golden["dynamic"]));
        assert!(largest_difference(&dynamic_codes(Device::Cpu), &dynamic) < 1e-7);
        for case in golden["cases"].as_array().unwrap() {
            let matrix = Tensor::from_slice(&numbers(&case["matrix"])).view([case["rows"].as_i64().unwrap(), -1]);
            let exact = Nf4Matrix::quantise(&matrix, Nf4Options { double_quant: false });
            let codes: Vec<u8> = numbers(&case["codes"]).iter().map(|&code| code as u8).collect();
            assert_eq!(bytes(&exact.codes), codes);
            let expect = |key: &str| Tensor::from_slice(&numbers(&case[key])).view_as(&matrix);
            assert!(exact.dequantise(Kind::Float).equal(&expect("values")));
            let double = Nf4Matrix::quantise(&matrix, Nf4Options { double_quant: true });
            let Scales::Quantised { codes, .. } = &double.scales else { panic!("scales are quantised") };
            let scale_codes: Vec<u8> = numbers(&case["scale_codes"]).iter().map(|&code| code as u8).collect();
            assert_eq!(bytes(codes), scale_codes);
            assert!(largest_difference(&double.dequantise(Kind::Float), &expect("double_values")) < 1e-6);
        }
    }

    #[test]
    fn what_is_on_the_grid_comes_back_unchanged() {
        // Blocks that hold every code times a scale of their own, and one of zeros.
        let grid = Tensor::from_slice(&NF4).repeat([3, 4]) * Tensor::from_slice(&[0.5_f32, 2.0, 0.0]).unsqueeze(1);
        let quantised = Nf4Matrix::quantise(&grid, Nf4Options { double_quant: false });
        assert!(quantised.dequantise(Kind::Float).equal(&grid));
        assert_eq!(quantised.dequantise(Kind::BFloat16).kind(), Kind::BFloat16);
        assert_eq!(quantised.num_bytes(), 3 * (32 + 4));
    }

    #[test]
    fn any_number_of_elements_is_stored_within_half_a_step() {
        for (case, numel) in [1_i64, 2, 63, 64, 65, 127, 1000, 16385].into_iter().enumerate() {
            let values = crate::weights::normal_values(numel as usize, 0.05, case as u64);
            let matrix = Tensor::from_slice(&values).view([1, numel]);
            let blocks = in_blocks(&matrix.view([-1]), BLOCK);
            let scales = blocks.abs().amax([1], true).expand_as(&blocks).reshape([-1]).narrow(0, 0, numel);
            for double_quant in [false, true] {
                let quantised = Nf4Matrix::quantise(&matrix, Nf4Options { double_quant });
                assert_eq!(quantised.num_bytes(), Nf4Matrix::bytes_of(numel as usize, Nf4Options { double_quant }));
                let error = (quantised.dequantise(Kind::Float) - &matrix).abs().view([-1]);
                // Half of the widest step, 1 - 0.696, and what 8 bits leave of a scale.
                let bound = &scales * (0.152 + if double_quant { 0.05 } else { 0.0 }) + 1e-6;
                assert!(bool::try_from(error.le_tensor(&bound).all()).unwrap(), "{numel} elements, {double_quant}");
            }
        }
    }
}
