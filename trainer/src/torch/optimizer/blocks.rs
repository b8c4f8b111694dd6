//! Block-wise dynamic quantisation to 8 bits (Dettmers et al., arXiv 2110.02861).
//!
//! A block of 256 elements is stored as its largest magnitude in fp32 and, for each element, the index of the value of
//! a code book of 256 values that is nearest to the element divided by that magnitude. The code books are those of
//! bitsandbytes' `create_dynamic_map`: values lie close together near 0, and far apart near 1.

use aha_core::manifest::SHARD_BLOCK;
use tch::{Device, Kind, Tensor};

/// Elements of a block.
pub(super) const BLOCK: i64 = SHARD_BLOCK as i64;
/// Powers of ten that the values span.
const NUM_EXPONENTS: i32 = 7;

/// The values that elements are rounded to.
#[derive(Debug)]
pub(super) struct CodeBook {
    /// Ascending, `[256]`.
    values: Tensor,
    /// Between neighbours, `[255]`.
    midpoints: Tensor,
    /// Index of the value 0, where there are negative ones too.
    signed_zero: Option<i64>,
}

impl CodeBook {
    /// For values in `[-1, 1]`.
    pub(super) fn signed(device: Device) -> Self {
        Self::new(true, device)
    }

    /// For values in `[0, 1]`, with one bit more of them.
    pub(super) fn unsigned(device: Device) -> Self {
        Self::new(false, device)
    }

    fn new(signed: bool, device: Device) -> Self {
        let options = (Kind::Float, Device::Cpu);
        let mut parts = vec![Tensor::from_slice(&[0.0_f32, 1.0])];
        for exponent in 0..NUM_EXPONENTS {
            let count = 1_i64 << if signed { exponent } else { exponent + 1 };
            let bounds = Tensor::linspace(0.1, 1.0, count + 1, options);
            let means = (bounds.narrow(0, 0, count) + bounds.narrow(0, 1, count)) / 2.0;
            let values = means * 10_f64.powi(exponent + 1 - NUM_EXPONENTS);
            if signed {
                parts.push(-&values);
            }
            parts.push(values);
        }
        let (values, _) = Tensor::cat(&parts, 0).sort(0, false);
        let midpoints = (values.narrow(0, 0, 255) + values.narrow(0, 1, 255)) / 2.0;
        let signed_zero = signed.then(|| values.lt(0.0).sum(Kind::Int64).int64_value(&[]));
        Self { values: values.to_device(device), midpoints: midpoints.to_device(device), signed_zero }
    }

    /// # Shapes
    /// `elements`: `[n]` fp32, `n` a multiple of 256; returns codes, `[n]` bytes, and magnitudes, `[n / 256]`.
    ///
    /// A negative element never becomes 0, as in bitsandbytes, so that the first moment keeps its direction.
    pub(super) fn encode(&self, elements: &Tensor) -> (Tensor, Tensor) {
        let blocks = elements.view([-1, BLOCK]); // [n / 256, 256]
        let absmax = blocks.abs().amax([1_i64].as_slice(), true); // [n / 256, 1]
        let shares = &blocks / (&absmax + absmax.eq(0.0).to_kind(Kind::Float));
        let mut codes = shares.bucketize(&self.midpoints, true, false);
        if let Some(zero) = self.signed_zero {
            codes -= codes.eq(zero).logical_and(&shares.lt(0.0)).to_kind(Kind::Int);
        }
        (codes.to_kind(Kind::Uint8).view([-1]), absmax.view([-1]))
    }

    /// # Shapes
    /// `codes`: `[n]`, `absmax`: `[n / 256]`; returns `[n]` fp32.
    pub(super) fn decode(&self, codes: &Tensor, absmax: &Tensor) -> Tensor {
        let shares = self.values.index_select(0, &codes.to_kind(Kind::Int)).view([-1, BLOCK]);
        (shares * absmax.unsqueeze(1)).view([-1])
    }

    /// The code of a zero, which new moments have.
    pub(super) fn zero(&self) -> i64 {
        self.signed_zero.unwrap_or(0)
    }

    #[cfg(test)]
    pub(super) fn values(&self) -> Vec<f32> {
        Vec::try_from(&self.values).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_takes_the_nearest_value() {
        tch::manual_seed(1);
        let exponents = Tensor::rand([40 * BLOCK], (Kind::Float, Device::Cpu)) * 14.0 - 7.0;
        let random: Tensor = Tensor::randn([40 * BLOCK], (Kind::Float, Device::Cpu)) * exponents.exp();
        for (book, elements) in
            [(CodeBook::signed(Device::Cpu), random.shallow_clone()), (CodeBook::unsigned(Device::Cpu), random.abs())]
        {
            let (codes, absmax) = book.encode(&elements);
            let decoded = Vec::<f32>::try_from(book.decode(&codes, &absmax)).unwrap();
            let (absmax, elements) = (Vec::<f32>::try_from(absmax).unwrap(), Vec::<f32>::try_from(elements).unwrap());
            let values = book.values();
            for (index, (&element, &decoded)) in elements.iter().zip(&decoded).enumerate() {
                let largest = absmax[index / BLOCK as usize];
                let error = |value: f32| (element / largest - value).abs();
                let nearest = values.iter().map(|&value| error(value)).fold(f32::INFINITY, f32::min);
                let taken = error(decoded / largest);
                let kept_sign = element < 0.0 && decoded < 0.0 && error(0.0) <= nearest;
                assert!(taken <= nearest + 1e-6 || kept_sign, "{element} of {largest} became {decoded}");
                assert!(element >= 0.0 || decoded < 0.0, "{element} lost its sign");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let book = CodeBook::signed(Device::Cpu);
        let (codes, absmax) = book.encode(&Tensor::zeros([BLOCK], (Kind::Float, Device::Cpu)));
        assert_eq!((codes.int64_value(&[7]), absmax.double_value(&[0])), (book.zero(), 0.0));
        assert_eq!(book.decode(&codes, &absmax).abs().max().double_value(&[]), 0.0);
    }
}
