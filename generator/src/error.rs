//! What can go wrong with a request.

use aha_proto::BadMessage;

use crate::engine::EngineError;
use crate::torch::UpdateError;

/// Why a request was refused or could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// The request makes no sense.
    #[error(transparent)]
    Invalid(#[from] BadMessage),
    #[error("request_id: {0:?} is already in flight")]
    Duplicate(String),
    #[error("request_id: {0:?} is not in flight")]
    Unknown(String),
    /// A limit is reached; says which.
    #[error("{0}; try again when some have finished")]
    Busy(String),
    #[error("grpc-timeout: the deadline had passed when the call came")]
    Late,
    #[error("deadline exceeded: {finished} of {asked} completions were finished")]
    Deadline { finished: usize, asked: usize },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// A bug or a broken tokenizer, not the client's doing.
    #[error("{0}")]
    Internal(String),
}

/// A field of a request that is not as it must be.
pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> GeneratorError {
    BadMessage { field, problem: problem.into() }.into()
}
