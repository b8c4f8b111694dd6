//! Where the work of a GPU goes.

use tch::{Device, TchError, Tensor};

use crate::kernels::cuda::{CompileError, Launch, LaunchError, UnsupportedShape};

/// Performs work in the order in which it comes, beside the host. Tests have one that runs everything on the CPU.
pub trait Queue {
    /// Work that was captured, to be performed again and again on the same memory.
    type Graph: std::fmt::Debug;

    /// Where its tensors live.
    fn device(&self) -> Device;

    /// An i32 tensor of the host, `[len]`, that is fast to copy from and to.
    ///
    /// # Errors
    /// If there is no such memory.
    fn host_memory(&self, len: usize) -> Result<Tensor, GpuError>;

    /// # Errors
    /// If the kernel cannot be launched.
    ///
    /// # Safety
    /// The addresses in the launch are those of memory of this device that lives until the work is done, and that of
    /// every graph which captures it; they have the shapes and types that the launch's builder names; and what the
    /// kernel reads there keeps it within them.
    unsafe fn launch(&mut self, launch: &Launch) -> Result<(), GpuError>;

    /// `out = x * weight^T`, summed in fp32.
    ///
    /// # Shapes
    /// - x: `[M, in]`, weight: `[out, in]`, both bf16; out: `[M, out]`, bf16 or fp32.
    ///
    /// # Errors
    /// If libtorch refuses it.
    fn product(&mut self, x: &Tensor, weight: &Tensor, out: &Tensor) -> Result<(), GpuError>;

    /// Performs `work` once, which lets libraries prepare themselves, and then captures it. The memory it uses must
    /// outlive the graph.
    ///
    /// # Errors
    /// Those of `work`, or if it cannot be captured.
    fn capture(&mut self, work: impl Fn(&mut Self) -> Result<(), GpuError>) -> Result<Self::Graph, GpuError>;

    /// # Errors
    /// If the graph cannot be launched.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), GpuError>;

    /// Waits for everything before.
    ///
    /// # Errors
    /// What any work failed with.
    fn synchronize(&mut self) -> Result<(), GpuError>;

    /// Gives memory that no tensor uses back.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`].
    fn free_unused_memory(&mut self) -> Result<(), GpuError>;
}

/// Why the GPU did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    #[error(transparent)]
    Unsupported(#[from] UnsupportedShape),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
    #[error("{operation}: {reason}")]
    Cuda { operation: &'static str, reason: String },
    #[error("{what} is {value}, and must be below {bound}")]
    OutOfBounds { what: &'static str, value: usize, bound: usize },
    #[error("logit {token} of row {row} is NaN or infinite: the weights have diverged")]
    BadLogit { row: usize, token: i32 },
    #[error("no token is allowed in row {row}")]
    NothingAllowed { row: usize },
    #[error("row {row} of the step state ended as {outcome}, which cannot be")]
    BadOutcome { row: usize, outcome: String },
    #[error("the cache's memory is given back, and no step can run before it is restored")]
    Released,
    #[error("there are no weights, and no step can run before some are put in place")]
    NoWeights,
}
