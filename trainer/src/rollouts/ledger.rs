//! What a rollout has received so far. It outlives the calls that fill it, and the generators that answer them.

use aha_core::rollout::Group;
use tokio::time::Instant;

use super::RolloutRequest;
use super::receipt::Receipt;

/// Every sample of a request, each taken once.
#[derive(Debug)]
pub struct Ledger<'a> {
    pub(super) request: &'a RolloutRequest,
    /// One a prompt, in the request's order.
    pub(super) receipts: Vec<Receipt<'a>>,
    pub(super) started: Instant,
}

impl<'a> Ledger<'a> {
    #[must_use]
    pub fn new(request: &'a RolloutRequest) -> Self {
        let receipts = request.prompts.iter().map(|prompt| Receipt::new(request, prompt)).collect();
        Self { request, receipts, started: Instant::now() }
    }

    /// Completions that have arrived.
    #[must_use]
    pub fn num_received(&self) -> usize {
        let expected = self.receipts.len() * self.request.num_generations;
        expected - self.receipts.iter().map(|receipt| receipt.missing().len()).sum::<usize>()
    }

    /// The groups, if they are complete.
    #[must_use]
    pub fn into_groups(self) -> Option<Vec<Group>> {
        self.receipts.into_iter().map(Receipt::into_group).collect()
    }
}
