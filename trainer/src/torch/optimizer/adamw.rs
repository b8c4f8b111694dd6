//! AdamW with fp32 moments, for some or all of the owned elements.

use aha_nn::optim::{AdamW, AdamWError, ShardPart, fused_adamw, gpu_adamw};
use tch::{Device, Kind, Tensor};

use super::super::range::Range;
use super::blocks::BLOCK;
use super::selection::Selection;
use super::{StateTensor, Update};

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

/// `range` cut where weight decay begins and ends, and whether it applies to each piece. `decayed` ascend without overlap.
fn decay_pieces(range: Range, decayed: &[Range]) -> Vec<(Range, bool)> {
    let (mut pieces, mut start) = (Vec::new(), range.start);
    for part in decayed.iter().filter_map(|part| part.intersection(range)) {
        pieces.extend([(Range { start, len: part.start - start }, false), (part, true)]);
        start = part.end();
    }
    pieces.push((Range { start, len: range.end() - start }, false));
    pieces.retain(|(piece, _)| piece.len > 0);
    pieces
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

    /// Scale, decay, update and the rounded copy in one pass of the GPU's kernel. `target`, `grad` and `copy`: `[owned]`.
    pub(super) fn update_on_gpu(
        &mut self,
        (target, copy): (&Tensor, Option<&Tensor>),
        grad: &Tensor,
        decayed: &[Range],
        update: &Update<'_>,
    ) -> Result<(), AdamWError> {
        for (owned, kept) in self.selection.pairs() {
            for (piece, decays) in decay_pieces(owned, decayed) {
                let kept = Range { start: kept.start + piece.start - owned.start, len: piece.len };
                let part_copy = copy.map(|copy| piece.of(copy));
                let part = ShardPart {
                    weights: &piece.of(target),
                    grad: &piece.of(grad),
                    exp_avg: &kept.of(&self.moments.exp_avg),
                    exp_avg_sq: &kept.of(&self.moments.exp_avg_sq),
                    copy: part_copy.as_ref(),
                    decays,
                };
                gpu_adamw(&part, update.scale, update.step, update.options)?;
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
    fn pieces_decay_or_do_not() {
        let range = |start, end| Range { start, len: end - start };
        let of = |start, end, decayed: &[Range]| {
            let pieces = decay_pieces(range(start, end), decayed).into_iter();
            pieces.map(|(piece, decays)| (piece.start, piece.end(), decays)).collect::<Vec<_>>()
        };
        assert_eq!(of(3, 9, &[]), [(3, 9, false)]);
        assert_eq!(of(3, 9, &[range(0, 3), range(9, 12)]), [(3, 9, false)]);
        assert_eq!(of(3, 9, &[range(0, 20)]), [(3, 9, true)]);
        let mixed = [range(1, 4), range(4, 5), range(7, 9)];
        assert_eq!(of(3, 10, &mixed), [(3, 4, true), (4, 5, true), (5, 7, false), (7, 9, true), (9, 10, false)]);
        assert_eq!(of(3, 3, &mixed), []);
    }

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
