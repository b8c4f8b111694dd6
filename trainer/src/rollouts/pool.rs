//! The generators as one pool, which takes several rollouts at once.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use aha_core::config::RunConfig;
use aha_core::ids::PolicyVersion;
use tokio::runtime::Runtime;
use tokio_util::task::AbortOnDropHandle;

use super::call::Call;
use super::filling::Filling;
use super::membership::Membership;
use super::{Late, Ledger, RolloutError};
use crate::clients::{Client, Connector, seconds};
use crate::rewarders::Rewarders;

/// The generators of a run.
pub struct GeneratorPool {
    runtime: Arc<Runtime>,
    clients: Vec<Client>,
    shared: Arc<Shared>,
}

/// How far a rollout has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Completions that have arrived.
    pub done: usize,
    pub total: usize,
}

/// What all rollouts of a pool have in common.
pub(super) struct Shared {
    membership: RwLock<Arc<Membership>>,
    /// Policy that was, or is being, published last.
    newest: AtomicU64,
    /// For what generators do not score.
    pub(super) rewarders: Rewarders,
    on_progress: Mutex<Box<dyn FnMut(Progress) + Send>>,
    /// Tells this client's requests from those of others, and one from the next.
    client_id: u64,
    num_requests: AtomicU64,
    activity: Mutex<Activity>,
}

/// Whether anything is being rolled out.
#[derive(Debug, Default)]
struct Activity {
    num_filling: usize,
    /// When the last rollout ended, where there is none.
    idle_since: Option<Instant>,
    idle: Duration,
}

/// Counts as a rollout while it lives.
struct Busy(Arc<Shared>);

impl GeneratorPool {
    /// Connects to `generator.addresses` and waits until all of them answer.
    ///
    /// # Errors
    /// Names the first address that is none, or that did not answer in time.
    pub fn connect(
        config: &RunConfig,
        connector: &Connector,
        rewarders: Rewarders,
        runtime: Arc<Runtime>,
    ) -> Result<Self, RolloutError> {
        let addresses = &config.generator.addresses;
        if addresses.is_empty() && config.generator.coordinator.is_none() {
            return Err(RolloutError::NoGenerators);
        }
        let timeout = seconds(config.generator.connect_timeout_seconds);
        let connecting = addresses.iter().map(|address| connector.connect(address, timeout));
        let clients = runtime.block_on(futures::future::try_join_all(connecting))?;
        let shared = Shared {
            membership: RwLock::new(Arc::new(Membership::new(&clients, &[]))),
            newest: AtomicU64::new(0),
            rewarders,
            on_progress: Mutex::new(Box::new(|_| {})),
            client_id: RandomState::new().build_hasher().finish(),
            num_requests: AtomicU64::new(0),
            activity: Mutex::new(Activity::default()),
        };
        Ok(Self { runtime, clients, shared: Arc::new(shared) })
    }

    /// Calls `on_progress` with every completion that arrives.
    pub fn set_on_progress(&mut self, on_progress: impl FnMut(Progress) + Send + 'static) {
        *lock(&self.shared.on_progress) = Box::new(on_progress);
    }

    /// The generators that are asked, at first in the order of `generator.addresses`.
    #[must_use]
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// Asks others from now on, for what rollouts under way still miss as well.
    pub fn set_clients(&mut self, clients: Vec<Client>) {
        let mut membership = self.shared.membership.write().unwrap_or_else(PoisonError::into_inner);
        *membership = Arc::new(Membership::new(&clients, &membership.members));
        self.clients = clients;
    }

    /// Who judges what generators do not score.
    #[must_use]
    pub fn rewarders(&self) -> &Rewarders {
        &self.shared.rewarders
    }

    /// The policy that was, or is being, published last.
    #[must_use]
    pub fn newest(&self) -> PolicyVersion {
        self.shared.newest()
    }

    /// From now on, `version` may have sampled tokens.
    pub fn set_newest(&self, version: PolicyVersion) {
        self.shared.newest.store(version.0, Ordering::SeqCst);
    }

    /// Forgets what was held against generators: all of them have taken the newest policy.
    pub fn absolve(&self) {
        self.shared.membership().absolve();
    }

    /// Begins to ask for what a ledger misses.
    #[must_use]
    pub fn begin(&self, ledger: &Arc<Ledger>) -> Filling {
        let call = Call::new(&self.shared, ledger);
        let busy = Busy::new(&self.shared);
        Filling::Running(AbortOnDropHandle::new(self.runtime.spawn(async move {
            let outcome = call.run().await;
            drop(busy);
            outcome
        })))
    }

    /// Waits until nothing is missing, but for groups that could not be had in time.
    ///
    /// # Errors
    /// If a completion cannot be had, is malformed, or was sampled by another policy; what has arrived stays in the ledger.
    pub fn wait(&self, filling: Filling) -> Result<Vec<Late>, RolloutError> {
        filling.outcome(&self.runtime)
    }

    /// Time for which nothing was rolled out, between rollouts, since it was last asked for.
    #[must_use]
    pub fn take_idle(&self) -> Duration {
        std::mem::take(&mut lock(&self.shared.activity).idle)
    }
}

impl fmt::Debug for GeneratorPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GeneratorPool").field("clients", &self.clients).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn membership(&self) -> Arc<Membership> {
        Arc::clone(&self.membership.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn newest(&self) -> PolicyVersion {
        PolicyVersion(self.newest.load(Ordering::SeqCst))
    }

    /// A name that no other request has.
    pub(super) fn request_id(&self) -> String {
        format!("{:016x}-{}", self.client_id, self.num_requests.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn report(&self, progress: Progress) {
        (lock(&self.on_progress))(progress);
    }
}

impl Busy {
    fn new(shared: &Arc<Shared>) -> Self {
        let mut activity = lock(&shared.activity);
        activity.num_filling += 1;
        let idle = activity.idle_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        activity.idle += idle;
        Self(Arc::clone(shared))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut activity = lock(&self.0.activity);
        activity.num_filling -= 1;
        if activity.num_filling == 0 {
            activity.idle_since = Some(Instant::now());
        }
    }
}

/// What these locks guard stays in order whoever panics.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
