//! Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): the momentum of a matrix, made nearly orthogonal.
//!
//! As `torch.optim.Muon`, whose constants these are, with Nesterov's momentum. It serves the matrices of layers;
//! embedding, head, norms and biases have AdamW. The momentum is sharded; an update is made from whole matrices, each
//! rank computing those that its shard has a part of.

use aha_core::manifest::UnitSpec;
use aha_core::optimizer::MuonOptions;
use aha_nn::optim::AdamW;
use tch::{Device, Kind, Tensor};

use super::super::range::Range;
use super::adamw::Adamw;
use super::selection::Selection;
use super::{OptimizerError, StateTensor, Update, param_ranges};

const MOMENTUM: f64 = 0.95;
const NUM_ITERATIONS: usize = 5;
/// Of the iteration `x <- a x + (b x x' + c (x x')^2) x`.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// Least norm that a matrix is divided by.
const EPSILON: f64 = 1e-7;

/// The state of one unit's owned elements.
#[derive(Debug)]
pub(super) struct Muon {
    options: MuonOptions,
    /// Those that the owned range has a part of.
    matrices: Vec<Matrix>,
    /// Elements of matrices.
    selection: Selection,
    /// Of the selected elements, one after the other, fp32.
    momentum: Tensor,
    /// Everything else.
    adamw: Adamw,
    owned: Range,
}

#[derive(Debug)]
struct Matrix {
    /// In the unit.
    range: Range,
    rows: i64,
    columns: i64,
}

/// Whether Muon updates the matrices of this unit: it is a layer, and neither the embedding nor the head.
pub(crate) fn serves(unit: &UnitSpec) -> bool {
    unit.name.starts_with("layers.")
}

impl Muon {
    pub(super) fn zeros(unit: &UnitSpec, owned: Range, options: MuonOptions, device: Device) -> Self {
        let mut matrices = Vec::new();
        let mut others = Vec::new();
        for (range, shape) in param_ranges(unit) {
            match *shape {
                [rows, columns] if serves(unit) => {
                    matrices.push(Matrix { range, rows: rows as i64, columns: columns as i64 });
                }
                _ => others.push(range),
            }
        }
        let selected: Vec<Range> = matrices.iter().map(|matrix| matrix.range).collect();
        let selection = Selection::new(&selected, owned);
        matrices.retain(|matrix| matrix.range.intersection(owned).is_some());
        Self {
            options,
            momentum: Tensor::zeros([selection.len()], (Kind::Float, device)),
            adamw: Adamw::zeros(Selection::new(&others, owned), device),
            matrices,
            selection,
            owned,
        }
    }

    /// `target` and `grad`: `[owned]`; `grad` is overwritten.
    pub(super) fn update(&mut self, target: &Tensor, grad: &Tensor, update: &Update<'_>) -> Result<(), OptimizerError> {
        self.adamw.update(target, grad, update.step, update.options)?;
        if self.selection.whole_len == 0 {
            return Ok(());
        }
        for (owned, kept) in self.selection.pairs() {
            let mut grad = owned.of(grad);
            let momentum = kept.of(&self.momentum).lerp_(&grad, 1.0 - MOMENTUM);
            drop(grad.lerp_(&momentum, MOMENTUM));
        }
        // The iteration computes in bf16, so that no more needs to travel.
        let mut direction = grad.to_kind(Kind::BFloat16);
        let mut start = self.owned.start;
        if let Some(group) = update.group {
            direction = direction.to_device(group.device());
            let len = direction.numel() * group.size();
            let mut whole = Tensor::empty([len as i64], (Kind::BFloat16, group.device()));
            group.all_gather(&direction, &mut whole)?;
            (direction, start) = (whole, 0);
        }
        for matrix in &self.matrices {
            let matrix_direction = matrix.range.relative_to(start).of(&direction).view([matrix.rows, matrix.columns]);
            self.apply(matrix, &orthogonalized(&matrix_direction), target, update.options);
        }
        Ok(())
    }

    /// Moves the owned elements of a matrix, after decay.
    fn apply(&self, matrix: &Matrix, direction: &Tensor, target: &Tensor, options: &AdamW) {
        let Some(part) = matrix.range.intersection(self.owned) else { return };
        let lr = options.lr * self.options.lr_ratio;
        let factor = self.options.adjust_lr.factor(matrix.rows, matrix.columns);
        let direction = part.relative_to(matrix.range.start).of(&direction.reshape([-1]));
        let mut weights = part.relative_to(self.owned.start).of(target);
        weights *= 1.0 - lr * options.weight_decay;
        weights -= direction.to_device(target.device()).to_kind(Kind::Float) * (lr * factor);
    }

    pub(super) fn tensors(&self) -> Vec<StateTensor> {
        let mut tensors = vec![StateTensor::selected("momentum_buffer", &self.momentum, &self.selection)];
        tensors.extend(self.adamw.tensors());
        tensors
    }
}

/// A matrix with nearly the singular vectors of `matrix` and singular values near 1, by Newton and Schulz's iteration.
///
/// # Shapes
/// `[rows, columns]` in bf16, and so is the result.
fn orthogonalized(matrix: &Tensor) -> Tensor {
    let [a, b, c] = COEFFICIENTS;
    let (rows, columns) = matrix.size2().expect("Muon's matrices have two dimensions");
    let wide = if rows > columns { matrix.transpose(0, 1) } else { matrix.shallow_clone() };
    let mut x = (&wide / wide.norm().clamp_min(EPSILON)).unsqueeze(0); // [1, m, n], m <= n
    for _ in 0..NUM_ITERATIONS {
        let gram = x.matmul(&x.transpose(1, 2)); // [1, m, m]
        let polynomial = gram.baddbmm(&gram, &gram, b, c);
        x = x.baddbmm(&polynomial, &x, a, 1.0);
    }
    let x = x.squeeze_dim(0);
    if rows > columns { x.transpose(0, 1) } else { x }
}
