//! AdamW with fp32 moments, for some or all of the owned elements.

use aha_nn::optim::{AdamW, AdamWError, fused_adamw};
use tch::{Device, Kind, Tensor};

use super::super::range::Range;
use super::StateTensor;
use super::blocks::BLOCK;
use super::selection::Selection;

/// Means of gradients and of their squares, `[n]` each, fp32.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
}

/// The moments of the selected elements.
#[derive(Debug)]
pub(super) struct Adamw {
    selection: Selection,
    moments: Moments,
}

impl Moments {
    pub(super) fn zeros(len: i64, device: Device) -> Self {
        let zeros = || Tensor::zeros([len], (Kind::Float, device));
        Self { exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    /// Moves `target` by the gradient, `[n]` each, without weight decay.
    pub(super) fn update(
        &mut self,
        target: &mut Tensor,
        grad: &Tensor,
        step: u64,
        options: &AdamW,
    ) -> Result<(), AdamWError> {
        let options = AdamW { weight_decay: 0.0, ..*options };
        fused_adamw(target, grad, (&mut self.exp_avg, &mut self.exp_avg_sq), step, &options)
    }
}

impl Moments {
    /// Moves the elements `piece` of `target`, a part of one block; `self` are their moments.
    ///
    /// libtorch's kernel rounds the last elements of a tensor otherwise than those before. It is given the whole block,
    /// so that an element's place in it decides and not where a shard was cut.
    fn update_in_block(
        &mut self,
        piece: Range,
        (target, grad): (&Tensor, &Tensor),
        step: u64,
        options: &AdamW,
    ) -> Result<(), AdamWError> {
        let block = Range { start: piece.start / BLOCK * BLOCK, len: BLOCK };
        let within = piece.relative_to(block.start);
        let mut moments = Self::zeros(BLOCK, target.device());
        within.of(&moments.exp_avg).copy_(&self.exp_avg);
        within.of(&moments.exp_avg_sq).copy_(&self.exp_avg_sq);
        let mut updated = block.of(target).copy();
        moments.update(&mut updated, &block.of(grad), step, options)?;
        piece.of(target).copy_(&within.of(&updated));
        self.exp_avg.copy_(&within.of(&moments.exp_avg));
        self.exp_avg_sq.copy_(&within.of(&moments.exp_avg_sq));
        Ok(())
    }
}

/// A range cut into whole blocks in one piece, and what is before and after them.
fn pieces(range: Range) -> impl Iterator<Item = Range> {
    let up = |element: i64| (element + BLOCK - 1) / BLOCK * BLOCK;
    let first = up(range.start).min(range.end());
    let last = (range.end() / BLOCK * BLOCK).max(first);
    [range.start, first, last, range.end()]
        .into_iter()
        .zip([first, last, range.end()])
        .filter(|(start, end)| start < end)
        .map(|(start, end)| Range { start, len: end - start })
}

impl Adamw {
    pub(super) fn zeros(selection: Selection, device: Device) -> Self {
        Self { moments: Moments::zeros(selection.len(), device), selection }
    }

    /// `target` and `grad`: `[owned]`.
    pub(super) fn update(
        &mut self,
        target: &Tensor,
        grad: &Tensor,
        step: u64,
        options: &AdamW,
    ) -> Result<(), AdamWError> {
        for (owned, kept) in self.selection.pairs() {
            for piece in pieces(owned) {
                let kept = Range { start: kept.start + piece.start - owned.start, len: piece.len };
                let mut moments =
                    Moments { exp_avg: kept.of(&self.moments.exp_avg), exp_avg_sq: kept.of(&self.moments.exp_avg_sq) };
                if piece.len % BLOCK == 0 {
                    moments.update(&mut piece.of(target), &piece.of(grad), step, options)?;
                } else {
                    moments.update_in_block(piece, (target, grad), step, options)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn tensors(&self) -> Vec<StateTensor> {
        let Moments { exp_avg, exp_avg_sq } = &self.moments;
        [("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)]
            .map(|(name, tensor)| StateTensor::selected(name, tensor, &self.selection))
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_blocks_and_what_is_beside_them() {
        let of = |start, end| {
            pieces(Range { start, len: end - start }).map(|piece| (piece.start, piece.end())).collect::<Vec<_>>()
        };
        assert_eq!(of(0, 512), [(0, 512)]);
        assert_eq!(of(10, 20), [(10, 20)]);
        assert_eq!(of(10, 256), [(10, 256)]);
        assert_eq!(of(200, 300), [(200, 256), (256, 300)]);
        assert_eq!(of(1, 1000), [(1, 256), (256, 768), (768, 1000)]);
    }
}
