//! The engine thread: owns the scheduler and the runner, and obeys commands between two steps.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use anyhow::{Context, anyhow};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout_at;

use super::batch::Runner;
use super::config::EngineConfig;
use super::handle::{COMMAND_CAPACITY, Command, EngineError, EngineHandle, EngineHealth, Reply, Scored, Swapped};
use super::request::{Refusal, Request, RequestKey, TokenEvent};
use super::scheduler::{Output, Scheduler};
use super::sequence::Task;
use super::stats::{Activity, EngineStatus, StepTimes};

/// Starts an engine thread, which makes its own runner with `build`; returns when that is done.
///
/// # Errors
/// If the sizes in `config` contradict each other, or `build` fails.
pub fn spawn<R, F>(config: EngineConfig, build: F) -> anyhow::Result<(EngineHandle<R::Staged>, EngineThread)>
where
    R: Runner,
    F: FnOnce() -> anyhow::Result<R> + Send + 'static,
{
    config.check()?;
    let (commands, mut receiver) = mpsc::channel(COMMAND_CAPACITY);
    let (health, health_receiver) = watch::channel(EngineHealth::Serving);
    let (built, is_built) = std::sync::mpsc::sync_channel(1);
    let body = move || {
        let runner = match catch(build) {
            Ok(runner) => runner,
            Err(error) => return built.send(Err(error)).context("nobody waits for the engine to start"),
        };
        let mut engine = Engine::new(config, runner);
        built.send(Ok(())).context("nobody waits for the engine to start")?;
        let ended = catch(|| engine.run(&mut receiver));
        health.send_replace(match &ended {
            Ok(()) => EngineHealth::Stopped,
            Err(error) => EngineHealth::Failed(format!("{error:#}")),
        });
        if let Err(error) = &ended {
            tracing::error!(error = format!("{error:#}"), "the engine has failed");
        }
        ended
    };
    let thread =
        std::thread::Builder::new().name("engine".to_owned()).spawn(body).context("start the engine thread")?;
    is_built.recv().context("the engine thread ended before it served")??;
    Ok((EngineHandle::new(commands, health_receiver), EngineThread(thread)))
}

/// The running thread. It may be dropped: the thread ends with the last handle all the same.
#[derive(Debug)]
pub struct EngineThread(JoinHandle<anyhow::Result<()>>);

impl EngineThread {
    /// Blocks until the thread has ended: stop the engine or drop all handles first.
    ///
    /// # Errors
    /// What the engine failed with.
    pub fn join(self) -> anyhow::Result<()> {
        self.0.join().unwrap_or_else(|panic| Err(anyhow!("the engine thread panicked: {}", message(&*panic))))
    }
}

/// Everything that lives on the engine thread.
#[derive(Debug)]
pub(super) struct Engine<R> {
    config: EngineConfig,
    scheduler: Scheduler,
    runner: R,
    clients: BTreeMap<RequestKey, Client>,
    activity: Activity,
    /// Time spent on scheduling.
    scheduling: Duration,
}

/// Whoever waits for a request.
#[derive(Debug)]
struct Client {
    prompt_id: PromptId,
    deadline: Instant,
    events: mpsc::Sender<TokenEvent>,
}

impl<R: Runner> Engine<R> {
    pub(super) fn new(config: EngineConfig, runner: R) -> Self {
        let scheduler = Scheduler::new(config.clone());
        let activity = if runner.has_weights() { Activity::Serving } else { Activity::Asleep };
        Self { config, scheduler, runner, clients: BTreeMap::new(), activity, scheduling: Duration::ZERO }
    }

    /// Takes steps and obeys commands until told to stop, or until nobody is left to tell.
    fn run(&mut self, commands: &mut mpsc::Receiver<Command<R::Staged>>) -> anyhow::Result<()> {
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build().context("start a timer")?;
        while self.obey(commands, &timer)?.is_continue() {
            self.abort_overdue(Instant::now());
            if self.has_work() {
                self.step()?;
            }
        }
        self.abort_all();
        Ok(())
    }

    /// One step: schedule, run, complete, emit.
    pub(super) fn step(&mut self) -> anyhow::Result<()> {
        let scheduled = Instant::now();
        let step = self.scheduler.schedule();
        anyhow::ensure!(!step.batch.items.is_empty(), "no sequence in flight can be scheduled: {:?}", self.status());
        self.scheduling += scheduled.elapsed();
        let sampled = self.runner.run(&step.batch).context("compute an engine step")?;
        let ran = Instant::now();
        let outputs = self.scheduler.complete(&step, sampled)?;
        self.emit(outputs);
        self.scheduling += ran.elapsed();
        Ok(())
    }

    /// Whether there is a step to take.
    pub(super) fn has_work(&self) -> bool {
        self.activity == Activity::Serving && self.scheduler.has_work()
    }

    /// Obeys the commands that have come. Where there is no step to take, waits for one first.
    fn obey(
        &mut self,
        commands: &mut mpsc::Receiver<Command<R::Staged>>,
        timer: &Runtime,
    ) -> anyhow::Result<ControlFlow<()>> {
        // Bounded, so that a flood of commands cannot keep a step from being taken.
        for num_obeyed in 0..COMMAND_CAPACITY {
            let must_wait = num_obeyed == 0 && !self.has_work();
            let command = match if must_wait { self.wait(commands, timer) } else { commands.try_recv() } {
                Ok(command) => command,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(ControlFlow::Break(())),
            };
            if self.apply(command)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Waits for a command, at most up to the next deadline of a request.
    fn wait(
        &self,
        commands: &mut mpsc::Receiver<Command<R::Staged>>,
        timer: &Runtime,
    ) -> Result<Command<R::Staged>, TryRecvError> {
        let received = match self.clients.values().map(|client| client.deadline).min() {
            Some(deadline) => timer.block_on(async { timeout_at(deadline.into(), commands.recv()).await }),
            None => Ok(commands.blocking_recv()),
        };
        match received {
            Ok(command) => command.ok_or(TryRecvError::Disconnected),
            Err(_elapsed) => Err(TryRecvError::Empty),
        }
    }

    /// Obeys one command; breaks at [`Command::Stop`].
    pub(super) fn apply(&mut self, command: Command<R::Staged>) -> anyhow::Result<ControlFlow<()>> {
        match command {
            Command::Add { request, reply } => answer(reply, self.add(*request).map_err(EngineError::from)),
            Command::Abort { key, reply } => answer(reply, Ok(self.abort(key))),
            Command::Finish { key, sample_index, num_tokens } => {
                self.scheduler.finish(key, sample_index, num_tokens);
                self.forget_if_done(key);
            }
            Command::Pause { reply } => {
                self.pause();
                answer(reply, Ok(()));
            }
            Command::Resume { reply } => answer(reply, self.resume()),
            Command::Sleep { drop_weights, reply } => {
                self.sleep(drop_weights)?;
                answer(reply, Ok(()));
            }
            Command::Wake { reply } => answer(reply, self.wake()?),
            Command::Swap { staged, version, reply } => answer(reply, Ok(self.swap(staged, version)?)),
            // A forward pass for nobody would hold up the next step.
            Command::Score { reply, .. } if reply.is_closed() => {}
            Command::Score { tokens, reply } => answer(reply, self.score(&tokens)?),
            Command::Status { reply } => answer(reply, Ok(self.status())),
            Command::Stop { reply } => {
                self.abort_all();
                answer(reply, Ok(()));
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn add(&mut self, request: Request) -> Result<(), Refusal> {
        let Request { key, prompt_id, prompt, sample_indices, sampling, seed, deadline, events } = request;
        let needed = Request::events_capacity(sample_indices.len(), sampling.max_tokens);
        if events.max_capacity() < needed {
            return Err(Refusal::SmallChannel { capacity: events.max_capacity(), needed });
        }
        let task = Task::new(key, prompt, sampling, seed, &self.config.eos_token_ids);
        self.scheduler.add(task, &sample_indices)?;
        self.clients.insert(key, Client { prompt_id, deadline, events });
        Ok(())
    }

    fn abort(&mut self, key: RequestKey) -> usize {
        let unfinished = self.scheduler.abort(key);
        if let Some(client) = self.clients.remove(&key) {
            for &sample_index in &unfinished {
                if client.events.try_send(TokenEvent::Aborted { sample_index }).is_err() {
                    tracing::debug!(request = %key, prompt = %client.prompt_id, "nobody waits for what is aborted");
                    break;
                }
            }
        }
        unfinished.len()
    }

    fn abort_all(&mut self) {
        while let Some((&key, _)) = self.clients.first_key_value() {
            self.abort(key);
        }
    }

    /// Aborts requests whose time is over or whose client has gone.
    pub(super) fn abort_overdue(&mut self, now: Instant) {
        let is_over = |client: &Client| client.deadline <= now || client.events.is_closed();
        let over: Vec<RequestKey> =
            self.clients.iter().filter(|(_, client)| is_over(client)).map(|(&key, _)| key).collect();
        for key in over {
            tracing::info!(request = %key, "aborted: its deadline has passed, or its client has gone");
            self.abort(key);
        }
    }

    fn emit(&mut self, outputs: Vec<Output>) {
        let mut finished = Vec::new();
        for (key, event) in outputs {
            finished.extend(event.finish().map(|_| key));
            let Some(client) = self.clients.get(&key) else { continue };
            // The channel holds every event that there can be, so it is never full.
            if client.events.try_send(event).is_err() {
                tracing::debug!(request = %key, prompt = %client.prompt_id, "the client has gone");
                self.abort(key);
            }
        }
        // Only now: the samples of a request may end in one step.
        finished.into_iter().for_each(|key| self.forget_if_done(key));
    }

    /// Closes the event channel of a request that has no unfinished samples.
    fn forget_if_done(&mut self, key: RequestKey) {
        if !self.scheduler.is_in_flight(key) {
            self.clients.remove(&key);
        }
    }

    fn pause(&mut self) {
        if self.activity == Activity::Serving {
            self.activity = Activity::Paused;
        }
    }

    fn resume(&mut self) -> Result<(), EngineError> {
        if self.activity == Activity::Asleep {
            return Err(EngineError::Asleep);
        }
        self.activity = Activity::Serving;
        Ok(())
    }

    fn sleep(&mut self, drop_weights: bool) -> anyhow::Result<()> {
        if self.activity != Activity::Asleep {
            self.scheduler.release_all();
            self.runner.release_cache().context("put the engine to sleep")?;
            self.activity = Activity::Asleep;
        }
        if drop_weights && self.runner.has_weights() {
            self.runner.release_weights().context("give the weights back")?;
        }
        Ok(())
    }

    /// The outer error ends the engine, the inner one goes to who asked.
    fn wake(&mut self) -> anyhow::Result<Result<(), EngineError>> {
        if !self.runner.has_weights() {
            return Ok(Err(EngineError::NoWeights));
        }
        if self.activity == Activity::Asleep {
            self.runner.restore_cache().context("wake the engine")?;
            self.activity = Activity::Serving;
        }
        Ok(Ok(()))
    }

    fn swap(&mut self, staged: R::Staged, version: PolicyVersion) -> anyhow::Result<Swapped<R::Staged>> {
        let start = Instant::now();
        let spare = self.runner.swap(staged).context("swap weights")?;
        self.scheduler.set_version(version);
        Ok(Swapped { spare, stood_still: start.elapsed() })
    }

    /// The outer error ends the engine, the inner one goes to who asked.
    fn score(&mut self, tokens: &[TokenId]) -> anyhow::Result<Result<Scored, EngineError>> {
        if self.activity == Activity::Asleep {
            return Ok(Err(EngineError::Asleep));
        }
        let block_table = match self.scheduler.borrow_blocks(tokens.len()) {
            Ok(block_table) => block_table,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        let logprobs = self.runner.score(tokens, block_table.ids()).context("score tokens")?;
        self.scheduler.give_back(block_table);
        Ok(Ok(Scored { logprobs, version: self.scheduler.version() }))
    }

    pub(super) fn status(&self) -> EngineStatus {
        EngineStatus {
            version: self.scheduler.version(),
            activity: self.activity,
            num_running: self.scheduler.num_running(),
            num_waiting: self.scheduler.num_waiting(),
            used_blocks: self.scheduler.num_used_blocks(),
            cached_blocks: self.scheduler.num_cached_blocks(),
            total_blocks: self.config.num_blocks,
            block_size: self.config.block_size,
            max_model_len: self.config.max_model_len,
            counters: self.scheduler.counters(),
            times: StepTimes { scheduling: self.scheduling, ..self.runner.times() },
        }
    }
}

fn answer<T>(reply: Reply<T>, value: Result<T, EngineError>) {
    if reply.send(value).is_err() {
        tracing::debug!("nobody waits for the answer to a command");
    }
}

/// Makes an error of a panic. Whatever `work` had borrowed is only dropped afterwards.
fn catch<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(anyhow!("panicked: {}", message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
