//! Log-probs of given tokens, one sequence after the other.
//!
//! A score is a whole forward pass on the engine's thread. The engine is given one at a time, so that it takes a step
//! between two of them whatever is asked for.

use std::sync::Arc;

use aha_core::ids::TokenId;
use tokio::sync::Semaphore;

use crate::engine::{EngineHandle, Scored};
use crate::error::GeneratorError;
use crate::torch::DeviceWeights;

/// Scores asked for and not answered; more are refused.
const MAX_SCORES: usize = 1024;

#[derive(Debug, Clone)]
pub(crate) struct Scorer {
    engine: EngineHandle<DeviceWeights>,
    places: Arc<Semaphore>,
    turn: Arc<Semaphore>,
}

impl Scorer {
    pub(crate) fn new(engine: EngineHandle<DeviceWeights>) -> Self {
        Self { engine, places: Arc::new(Semaphore::new(MAX_SCORES)), turn: Arc::new(Semaphore::new(1)) }
    }

    pub(crate) fn engine(&self) -> &EngineHandle<DeviceWeights> {
        &self.engine
    }

    /// Log-probs of `tokens[1..]`.
    ///
    /// # Errors
    /// If too many wait already, the tokens do not fit, or the engine is asleep or gone.
    pub(crate) async fn score(&self, tokens: Vec<TokenId>) -> Result<Scored, GeneratorError> {
        let busy = |_| GeneratorError::Busy(format!("{MAX_SCORES} scores are waiting, which is the limit"));
        let _place = self.places.try_acquire().map_err(busy)?;
        // The semaphore is never closed; if it were, scores would merely not take turns.
        let _turn = self.turn.acquire().await;
        Ok(self.engine.score(tokens).await?)
    }
}
