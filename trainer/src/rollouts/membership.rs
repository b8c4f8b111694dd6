//! The generators that take part, and what each of them owes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use aha_core::rollout::Prompt;
use tokio::sync::Semaphore;

use crate::clients::Client;

/// Prompts in flight for each generator: more than one batch of any engine, few enough to keep its queue short.
const MAX_IN_FLIGHT: usize = 256;

/// Whom rollouts ask.
pub(super) struct Membership {
    pub(super) members: Vec<Arc<Member>>,
    /// For prompts in flight; who came first is served first.
    pub(super) slots: Semaphore,
}

/// What is known of a generator.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) client: Client,
    /// Completions that it has been asked for and has not sent.
    owed: AtomicUsize,
    /// A call to it was lost, and none has succeeded since.
    pub(super) is_suspect: AtomicBool,
    /// It has served another policy than it should.
    pub(super) is_stale: AtomicBool,
}

/// What one call still waits for, counted in its generator's debts while it does.
pub(super) struct Debt<'a> {
    member: &'a Member,
    pub(super) owed: usize,
}

impl Membership {
    /// Those that were there `before` keep their debts.
    pub(super) fn new(clients: &[Client], before: &[Arc<Member>]) -> Self {
        let member = |client: &Client| {
            let known = before.iter().find(|known| known.client.address() == client.address());
            known.map_or_else(|| Arc::new(Member::new(client.clone())), Arc::clone)
        };
        let slots = Semaphore::new(MAX_IN_FLIGHT * clients.len());
        Self { members: clients.iter().map(member).collect(), slots }
    }

    /// The generator that owes the least of those in good standing, another one than `last` where there is one. Prompts go
    /// around those that owe the same.
    pub(super) fn choose(&self, prompt: &Prompt, last: Option<&Arc<Member>>) -> Option<&Arc<Member>> {
        let num_members = self.members.len();
        let turn = |index: usize| (index + num_members - (prompt.id.0 % num_members as u64) as usize) % num_members;
        let rank = |&(index, member): &(usize, &Arc<Member>)| {
            let is_last = last.is_some_and(|last| last.client.address() == member.client.address());
            let [is_stale, is_suspect] =
                [&member.is_stale, &member.is_suspect].map(|flag| flag.load(Ordering::Relaxed));
            (is_stale, is_suspect, is_last, member.owed.load(Ordering::Relaxed), turn(index))
        };
        self.members.iter().enumerate().min_by_key(rank).map(|(_, member)| member)
    }

    /// Whether none serves what it should.
    pub(super) fn are_all_stale(&self) -> bool {
        self.members.iter().all(|member| member.is_stale.load(Ordering::Relaxed))
    }

    pub(super) fn absolve(&self) {
        for flag in self.members.iter().flat_map(|member| [&member.is_stale, &member.is_suspect]) {
            flag.store(false, Ordering::Relaxed);
        }
    }
}

impl Member {
    fn new(client: Client) -> Self {
        let (is_suspect, is_stale) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { client, owed: AtomicUsize::new(0), is_suspect, is_stale }
    }
}

impl<'a> Debt<'a> {
    pub(super) fn new(member: &'a Member, owed: usize) -> Self {
        member.owed.fetch_add(owed, Ordering::Relaxed);
        Self { member, owed }
    }

    pub(super) fn pay(&mut self) {
        self.owed -= 1;
        self.member.owed.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Debt<'_> {
    fn drop(&mut self) {
        self.member.owed.fetch_sub(self.owed, Ordering::Relaxed);
    }
}
