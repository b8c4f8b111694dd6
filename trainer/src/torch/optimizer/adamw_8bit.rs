//! AdamW with moments in 8 bits, block by block.
//!
//! Blocks are counted from the start of the unit, so that they are the same for every sharding; bitsandbytes counts
//! them from the start of each parameter. As there, parameters under 4,096 elements keep fp32 moments: a block that has
//! an element of one does.

use aha_core::manifest::UnitSpec;
use aha_nn::optim::{AdamW, AdamWError};
use tch::{Device, Kind, Tensor};

use super::super::range::Range;
use super::StateTensor;
use super::adamw::Moments;
use super::blocks::{BLOCK, CodeBook};
use super::selection::Selection;

/// Parameters of fewer elements are exact, as in bitsandbytes.
pub(crate) const LEAST_NUMEL: usize = 4096;
/// Elements whose moments are decoded at once.
const CHUNK: i64 = 1 << 21;

/// The moments of all owned elements.
#[derive(Debug)]
pub(super) struct Adamw8bit {
    exp_avg: Moment,
    exp_avg_sq: Moment,
    /// Elements whose moments are exact.
    exact: Selection,
    /// What is owned, padding left out.
    real: Range,
    /// Elements of the unit.
    numel: i64,
}

/// One of the two moments.
#[derive(Debug)]
struct Moment {
    book: CodeBook,
    /// `[owned]`; without meaning where the moment is exact.
    codes: Tensor,
    /// `[owned / 256]`.
    absmax: Tensor,
    /// Moments of the exact elements, one after the other.
    exact: Tensor,
}

impl Adamw8bit {
    pub(super) fn zeros(unit: &UnitSpec, (owned, real): (Range, Range), device: Device) -> Self {
        let exact = Selection::new(&exact_ranges(unit), owned);
        let moment = |book: CodeBook| Moment {
            codes: Tensor::full([owned.len], book.zero(), (Kind::Uint8, device)),
            absmax: Tensor::zeros([owned.len / BLOCK], (Kind::Float, device)),
            exact: Tensor::zeros([exact.len()], (Kind::Float, device)),
            book,
        };
        Self {
            exp_avg: moment(CodeBook::signed(device)),
            exp_avg_sq: moment(CodeBook::unsigned(device)),
            exact,
            real,
            numel: unit.numel() as i64,
        }
    }

    /// `target` and `grad`: `[owned]`.
    pub(super) fn update(
        &mut self,
        target: &Tensor,
        grad: &Tensor,
        step: u64,
        options: &AdamW,
    ) -> Result<(), AdamWError> {
        let owned = target.numel() as i64;
        for start in (0..owned).step_by(CHUNK as usize) {
            let chunk = Range { start, len: CHUNK.min(owned - start) };
            let mut moments = Moments {
                exp_avg: self.exp_avg.decode(chunk, &self.exact),
                exp_avg_sq: self.exp_avg_sq.decode(chunk, &self.exact),
            };
            moments.update(&mut chunk.of(target), &chunk.of(grad), step, options)?;
            self.exp_avg.encode(chunk, &self.exact, &moments.exp_avg);
            self.exp_avg_sq.encode(chunk, &self.exact, &moments.exp_avg_sq);
        }
        Ok(())
    }

    pub(super) fn tensors(&self) -> Vec<StateTensor> {
        let names = [
            (&self.exp_avg, ["exp_avg_codes", "exp_avg_absmax", "exp_avg_exact"]),
            (&self.exp_avg_sq, ["exp_avg_sq_codes", "exp_avg_sq_absmax", "exp_avg_sq_exact"]),
        ];
        let mut tensors = Vec::new();
        for (moment, [codes, absmax, exact]) in names {
            let Range { start, len } = self.real;
            let codes_tensor = moment.codes.narrow(0, 0, len);
            tensors.push(StateTensor { name: codes, tensor: codes_tensor, offset: start, whole_len: self.numel });
            let num_blocks = |len: i64| (len as u64).div_ceil(BLOCK as u64) as i64;
            tensors.push(StateTensor {
                name: absmax,
                tensor: moment.absmax.narrow(0, 0, num_blocks(len)),
                offset: num_blocks(start),
                whole_len: num_blocks(self.numel),
            });
            tensors.push(StateTensor::selected(exact, &moment.exact, &self.exact));
        }
        tensors
    }
}

impl Moment {
    /// The moment of the owned elements `chunk`, a run of whole blocks.
    fn decode(&self, chunk: Range, exact: &Selection) -> Tensor {
        let decoded = self.book.decode(&chunk.of(&self.codes), &blocks_of(chunk).of(&self.absmax));
        for (within, kept) in within(chunk, exact) {
            within.of(&decoded).copy_(&kept.of(&self.exact));
        }
        decoded
    }

    fn encode(&self, chunk: Range, exact: &Selection, moment: &Tensor) {
        for (within, kept) in within(chunk, exact) {
            kept.of(&self.exact).copy_(&within.of(moment));
        }
        let (codes, absmax) = self.book.encode(moment);
        chunk.of(&self.codes).copy_(&codes);
        blocks_of(chunk).of(&self.absmax).copy_(&absmax);
    }
}

fn blocks_of(chunk: Range) -> Range {
    Range { start: chunk.start / BLOCK, len: chunk.len / BLOCK }
}

/// The exact elements of a chunk: where the chunk has them, and where they are kept.
fn within(chunk: Range, exact: &Selection) -> impl Iterator<Item = (Range, Range)> {
    exact.pairs().filter_map(move |(owned, kept)| {
        let part = owned.intersection(chunk)?;
        let kept = Range { start: kept.start + part.start - owned.start, len: part.len };
        Some((part.relative_to(chunk.start), kept))
    })
}

/// The elements of blocks that small parameters have a part in, padding left out.
fn exact_ranges(unit: &UnitSpec) -> Vec<Range> {
    let numel = unit.numel() as i64;
    let mut ranges: Vec<Range> = Vec::new();
    let mut end = 0;
    for param in &unit.params {
        let start = end;
        end = start + param.numel() as i64;
        if param.numel() >= LEAST_NUMEL || param.numel() == 0 {
            continue;
        }
        let start = (start / BLOCK * BLOCK).max(ranges.last().map_or(0, |last| last.end()));
        let stop = ((end + BLOCK - 1) / BLOCK * BLOCK).min(numel);
        if start < stop {
            ranges.push(Range { start, len: stop - start });
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use aha_core::manifest::ParamSpec;

    use super::*;

    #[test]
    fn blocks_of_small_parameters_are_exact() {
        let param = |(index, &numel): (usize, &usize)| ParamSpec::new(format!("p{index}"), &[numel]);
        let ranges = |numels: &[usize]| {
            let unit = UnitSpec { name: "u".to_owned(), params: numels.iter().enumerate().map(param).collect() };
            exact_ranges(&unit).iter().map(|range| (range.start, range.end())).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&[4096, 5000]), []);
        assert_eq!(ranges(&[4095]), [(0, 4095)]);
        // 8192 is the 32nd boundary: the middle one reaches from there into the first block of the last.
        assert_eq!(ranges(&[8192, 100, 5000]), [(8192, 8448)]);
        assert_eq!(ranges(&[8200, 10, 10, 5000]), [(8192, 8448)]);
        assert_eq!(ranges(&[300, 300, 9000, 20]), [(0, 512), (512, 768), (9472, 9620)]);
    }
}
