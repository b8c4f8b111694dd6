//! Pushes beside the training: one at a time, on a thread of its own.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use aha_core::config::{HubStrategy, RunConfig};
use aha_core::hub::{RepositoryId, Source};
use aha_trainer::checkpoint_sink::CheckpointSink;
use anyhow::Result;
use indicatif::ProgressBar;

use super::client::Client;
use super::push::push;
use super::there::add_card;
use super::upload::of_folder;

pub(super) struct HubSink {
    client: Arc<Client>,
    target: Source,
    run: String,
    is_private: bool,
    strategy: HubStrategy,
    timeout: Duration,
    under_way: Option<UnderWay>,
}

/// A push whose end is not known yet.
struct UnderWay {
    what: String,
    ended: Receiver<Result<String>>,
}

impl HubSink {
    pub(super) fn new(client: Client, id: RepositoryId, config: &RunConfig) -> Self {
        Self {
            client: Arc::new(client),
            target: Source { id, revision: Source::MAIN.to_owned() },
            run: config.run.name.clone(),
            is_private: config.hub.private,
            strategy: config.hub.strategy,
            timeout: Duration::from_secs_f64(config.hub.timeout_seconds),
            under_way: None,
        }
    }

    /// Opens the files of `folder`, which may be removed from then on, and sends them on a thread of its own.
    fn start(&mut self, folder: &Path, what: String) -> Result<()> {
        let mut uploads = of_folder(folder, false)?;
        add_card(&mut uploads, folder);
        let (sender, ended) = sync_channel(1);
        let (client, target, is_private) = (Arc::clone(&self.client), self.target.clone(), self.is_private);
        let message = format!("{what} of {}", self.run);
        std::thread::Builder::new().name("hub-push".to_owned()).spawn(move || {
            let pushed = push(&client, &target, &uploads, (is_private, &message), &ProgressBar::hidden());
            // Nobody waits any more where the run has ended.
            drop(sender.send(pushed));
        })?;
        self.under_way = Some(UnderWay { what, ended });
        Ok(())
    }

    /// Waits for what is under way until `deadline`; whether it ended by then.
    fn wait(&mut self, deadline: Instant) -> bool {
        let Some(push) = self.under_way.take() else { return true };
        let ended = push.ended.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let in_time = !matches!(ended, Err(RecvTimeoutError::Timeout));
        match ended {
            Ok(pushed) => report(&push.what, &self.target.id, pushed),
            Err(RecvTimeoutError::Timeout) => tracing::warn!(
                "{} is not on the Hub as {}: the push took longer than hub.timeout_seconds and was given up; `aha hub push` \
                 repeats it",
                push.what,
                self.target.id
            ),
            Err(RecvTimeoutError::Disconnected) => tracing::warn!("the push of {} ended without a word", push.what),
        }
        in_time
    }
}

impl CheckpointSink for HubSink {
    fn checkpoint(&mut self, folder: &Path, step: u64) {
        if self.strategy == HubStrategy::End {
            return;
        }
        let what = format!("step {step}");
        if let Some(push) = &self.under_way {
            match push.ended.try_recv() {
                Ok(pushed) => report(&push.what, &self.target.id, pushed),
                Err(TryRecvError::Disconnected) => tracing::warn!("the push of {} ended without a word", push.what),
                Err(TryRecvError::Empty) => {
                    tracing::info!("{what} is not pushed: {} is still on its way", push.what);
                    return;
                }
            }
            self.under_way = None;
        }
        if let Err(error) = self.start(folder, what.clone()) {
            tracing::warn!("{what} is not on the Hub as {}: {error:#}; training goes on", self.target.id);
        }
    }

    fn finish(&mut self, model: &Path) {
        let deadline = Instant::now() + self.timeout;
        if !self.wait(deadline) {
            return;
        }
        match self.start(model, "the model".to_owned()) {
            Ok(()) => _ = self.wait(deadline),
            Err(error) => tracing::warn!("the model is not on the Hub as {}: {error:#}", self.target.id),
        }
    }
}

fn report(what: &str, id: &RepositoryId, pushed: Result<String>) {
    match pushed {
        Ok(url) => tracing::info!("{what} is on the Hub as {id}: {url}"),
        Err(error) => tracing::warn!("{what} is not on the Hub as {id}: {error:#}; training goes on"),
    }
}

impl fmt::Debug for HubSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSink").field("target", &self.target).finish_non_exhaustive()
    }
}
