//! What the trainer's operations hand on: rows, and where the backward pass finds them.

use std::rc::Rc;

use tch::Tensor;

use crate::fused_kernels::Kernels;

/// Rows of a batch, `[N, width]`. Those of norms and gated products cost one pass over memory, so that the backward pass
/// computes them again (arXiv 2205.05198, section 4); kept, they were a third of a layer's activations.
#[derive(Debug)]
pub struct Activation {
    pub(crate) rows: Tensor,
    /// None where the rows are kept.
    recipe: Option<Rc<Recipe>>,
}

/// How to compute rows, from what others keep as well.
#[derive(Debug)]
pub(crate) enum Recipe {
    /// Of `x`, with the weight and epsilon.
    Norm(Kernels, Tensor, (Tensor, f64)),
    /// Of gate and up.
    Gated(Kernels, Tensor, Tensor),
}

/// What a backward pass holds of an [`Activation`].
#[derive(Debug)]
pub(crate) enum Source {
    Kept(Tensor),
    Recipe(Rc<Recipe>),
}

impl Activation {
    /// `rows` on the graph, and how to compute them without one.
    pub(crate) fn again(rows: Tensor, recipe: Recipe) -> Self {
        Self { rows, recipe: Some(Rc::new(recipe)) }
    }

    pub(crate) fn source(&self) -> Source {
        match &self.recipe {
            Some(recipe) => Source::Recipe(Rc::clone(recipe)),
            None => Source::Kept(self.rows.detach()),
        }
    }
}

impl From<Tensor> for Activation {
    fn from(rows: Tensor) -> Self {
        Self { rows, recipe: None }
    }
}

impl From<Activation> for Tensor {
    fn from(activation: Activation) -> Self {
        activation.rows
    }
}

impl Source {
    /// Without a graph.
    pub(crate) fn rows(&self) -> Tensor {
        match self {
            Self::Kept(rows) => rows.shallow_clone(),
            Self::Recipe(recipe) => match &**recipe {
                Recipe::Norm(kernels, x, (weight, eps)) => kernels.rms_norm(x, None, weight, *eps).0,
                Recipe::Gated(kernels, gate, up) => kernels.silu_mul(gate, up),
            },
        }
    }
}
