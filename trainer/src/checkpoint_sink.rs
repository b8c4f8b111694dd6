//! Where checkpoints go beside the run's folder.

use std::fmt::Debug;
use std::path::Path;

/// Takes what a run writes elsewhere, such as to the Hugging Face Hub. Trainer rank 0 alone has one. What fails there
/// is its own affair: training goes on.
pub trait CheckpointSink: Debug {
    /// `checkpoints/step-N` is whole after `step` steps. Returns at once; the folder may be removed after that.
    fn checkpoint(&mut self, folder: &Path, step: u64);

    /// The run has ended with this model. Waits for what is under way, and for this, up to a deadline.
    fn finish(&mut self, model: &Path);
}
