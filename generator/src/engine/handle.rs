//! The engine as everyone else sees it: a closed set of commands over one bounded channel.

use std::fmt;
use std::time::Duration;

use aha_core::ids::{PolicyVersion, TokenId};
use tokio::sync::{mpsc, oneshot, watch};

use super::request::{Refusal, Request, RequestKey};
use super::stats::EngineStatus;

/// Commands under way; who sends more waits.
pub(super) const COMMAND_CAPACITY: usize = 1024;

/// Whether the engine thread lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineHealth {
    Serving,
    /// It ended in order: stopped, or no handle was left.
    Stopped,
    /// It ended by an error or a panic, which this names. Every request in flight is lost.
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The engine thread is gone, and with it everything in flight.
    #[error("the engine is gone: {0}")]
    Gone(String),
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The KV cache is released.
    #[error("the engine is asleep: wake it first")]
    Asleep,
    /// They were given back when the engine fell asleep.
    #[error("the engine has no weights: push some before waking it")]
    NoWeights,
}

/// Log-probs of given tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// `[T - 1]`, of tokens 1.. given those before.
    pub logprobs: Vec<f32>,
    /// Of the weights.
    pub version: PolicyVersion,
}

/// What came of a swap.
#[derive(Debug)]
pub struct Swapped<S> {
    /// Memory for the next push; what it holds is up to the runner. None where no weights served before.
    pub spare: Option<S>,
    /// Time for which decoding stood still.
    pub stood_still: Duration,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// Everything that can be asked of the engine thread. Commands take effect between two steps, in order.
pub(super) enum Command<S> {
    Add { request: Box<Request>, reply: Reply<()> },
    Abort { key: RequestKey, reply: Reply<usize> },
    Finish { key: RequestKey, sample_index: u32, num_tokens: usize },
    Pause { reply: Reply<()> },
    Resume { reply: Reply<()> },
    Sleep { drop_weights: bool, reply: Reply<()> },
    Wake { reply: Reply<()> },
    Swap { staged: S, version: PolicyVersion, reply: Reply<Swapped<S>> },
    Score { tokens: Vec<TokenId>, reply: Reply<Scored> },
    Status { reply: Reply<EngineStatus> },
    Stop { reply: Reply<()> },
}

/// Talks to the engine thread; `S` is the runner's staged weights. The thread ends when the last handle is dropped.
pub struct EngineHandle<S> {
    commands: mpsc::Sender<Command<S>>,
    health: watch::Receiver<EngineHealth>,
}

impl<S> EngineHandle<S> {
    pub(super) fn new(commands: mpsc::Sender<Command<S>>, health: watch::Receiver<EngineHealth>) -> Self {
        Self { commands, health }
    }

    /// Queues a request, whose events begin to come.
    ///
    /// # Errors
    /// If the request can never be served, or the engine is gone.
    pub async fn add(&self, request: Request) -> Result<(), EngineError> {
        let request = Box::new(request);
        self.ask(|reply| Command::Add { request, reply }).await
    }

    /// Ends a request: its unfinished samples get [`TokenEvent::Aborted`](super::TokenEvent::Aborted) and free their
    /// blocks. Returns how many they were: 0 for a request that is not, or no longer, in flight.
    ///
    /// # Errors
    /// If the engine is gone, as for all that follow.
    pub async fn abort(&self, key: RequestKey) -> Result<usize, EngineError> {
        self.ask(|reply| Command::Abort { key, reply }).await
    }

    /// Ends one sample, in which a stop string was completed by its token number `num_tokens`. Events of later tokens
    /// may be on their way and are to be ignored; no other event follows.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn finish(&self, key: RequestKey, sample_index: u32, num_tokens: usize) -> Result<(), EngineError> {
        self.send(Command::Finish { key, sample_index, num_tokens }).await
    }

    /// Stops between two steps; requests stay, and are still taken.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn pause(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::Pause { reply }).await
    }

    /// Goes on after [`EngineHandle::pause`].
    ///
    /// # Errors
    /// If the engine is asleep or gone.
    pub async fn resume(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::Resume { reply }).await
    }

    /// Stops and gives the memory of the KV cache back; running sequences are computed again after
    /// [`EngineHandle::wake`].
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn sleep(&self, drop_weights: bool) -> Result<(), EngineError> {
        self.ask(|reply| Command::Sleep { drop_weights, reply }).await
    }

    /// Goes on after [`EngineHandle::sleep`]; does nothing to an engine that is awake.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn wake(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::Wake { reply }).await
    }

    /// Serves new weights from the next step on. What becomes of running sequences is `EngineConfig::kv`.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn swap(&self, staged: S, version: PolicyVersion) -> Result<Swapped<S>, EngineError> {
        self.ask(|reply| Command::Swap { staged, version, reply }).await
    }

    /// Log-probs of `tokens[1..]`, through the path that serves.
    ///
    /// # Errors
    /// If the tokens do not fit into the cache or the model, or the engine is asleep or gone.
    pub async fn score(&self, tokens: Vec<TokenId>) -> Result<Scored, EngineError> {
        self.ask(|reply| Command::Score { tokens, reply }).await
    }

    /// What the engine is doing.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn status(&self) -> Result<EngineStatus, EngineError> {
        self.ask(|reply| Command::Status { reply }).await
    }

    /// Aborts everything and ends the engine thread.
    ///
    /// # Errors
    /// If the engine is gone already.
    pub async fn stop(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::Stop { reply }).await
    }

    /// Changes when the engine thread ends.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<EngineHealth> {
        self.health.clone()
    }

    /// The error of an engine that no longer answers, once it has ended: for a request whose events ended too early, too.
    pub async fn gone(&self) -> EngineError {
        let mut health = self.health.clone();
        let ended = health.wait_for(|health| *health != EngineHealth::Serving).await;
        EngineError::Gone(match ended.as_deref() {
            Ok(EngineHealth::Failed(reason)) => reason.clone(),
            _ => "it was stopped".to_owned(),
        })
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command<S>) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(self.gone().await),
        }
    }

    async fn send(&self, command: Command<S>) -> Result<(), EngineError> {
        match self.commands.send(command).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.gone().await),
        }
    }
}

impl<S> Clone for EngineHandle<S> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), health: self.health.clone() }
    }
}

impl<S> fmt::Debug for EngineHandle<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("health", &*self.health.borrow()).finish_non_exhaustive()
    }
}
