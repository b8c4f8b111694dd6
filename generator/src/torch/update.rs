//! Receives new weights from the trainers, beside the engine's thread.
//!
//! One thread owns the process group. A push comes unit by unit into the spare set of weights; only a set whose every
//! unit has the hash that was announced is handed to the engine. Whatever goes wrong, the old weights go on serving.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use aha_core::ids::PolicyVersion;
use aha_core::manifest::{Bucket, Manifest};
use aha_nn::comm::{Address, Backend, CommError, GroupSpec, NameError, ProcessGroup, Store, Work, address_towards};
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::tensor_data::bytes;
use aha_nn::weights::split;
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use xxhash_rust::xxh3::xxh3_64;

use super::device_runner::{DeviceWeights, WeightFormat};
use crate::engine::{EngineError, EngineHandle};

/// Commands that may wait while one is worked on.
const MAX_WAITING: usize = 4;
/// Units begin at multiples of so many elements, as copies between devices like it.
const ALIGNMENT: usize = 256;

/// Which group to enter, and as whom.
#[derive(Debug, Clone)]
pub struct Membership {
    pub store_host: String,
    pub store_port: u16,
    pub group: String,
    /// Trainers come first: they are ranks `0..num_trainers`.
    pub rank: usize,
    pub size: usize,
    pub num_trainers: usize,
    pub manifest_hash: u64,
    /// Largest bucket, in elements.
    pub bucket_numel: usize,
    /// For all members to come together.
    pub limit: Duration,
    /// Bound on every collective.
    pub timeout: Duration,
    /// NCCL, between GPUs, or else Gloo.
    pub is_nccl: bool,
    /// Type of the weights that come.
    pub kind: Kind,
}

/// One version of the weights that is about to come.
#[derive(Debug, Clone)]
pub struct Push {
    pub group: String,
    pub version: PolicyVersion,
    /// xxh3 of each unit's bytes, in manifest order.
    pub unit_hashes: Vec<u64>,
}

/// What a push took.
#[derive(Debug, Clone, Copy)]
pub struct Pushed {
    /// To receive, check and pack; decoding went on meanwhile.
    pub receive: Duration,
    /// For which decoding stood still.
    pub swap: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error("manifest_hash: the trainer's model is {theirs:016x}, this generator serves {ours:016x}")]
    OtherManifest { theirs: u64, ours: u64 },
    #[error(
        "dtype: the trainer pushes {theirs:?}, and this generator takes {ours:?}; start it with the trainer's model.dtype \
         and model.device"
    )]
    OtherKind { theirs: Kind, ours: Kind },
    #[error("backend: NCCL goes between GPUs, and this generator's weights are on {device:?}")]
    NoGpu { device: Device },
    #[error("group: this generator is not in {0:?}; join it first")]
    NotJoined(String),
    #[error("unit_hashes: got {got} for the {units} units of the model")]
    WrongNumberOfHashes { got: usize, units: usize },
    #[error("unit {unit} arrived as {got:016x}, announced was {announced:016x}; the weights were not taken")]
    BadHash { unit: String, got: u64, announced: u64 },
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error("cannot find the address of this machine towards {store}: {source}")]
    NoAddress { store: String, source: NameError },
    #[error("cannot hold the new weights: {0:#}")]
    Weights(anyhow::Error),
    #[error("{MAX_WAITING} joins and pushes are waiting already")]
    Busy,
    #[error("the weight receiver has stopped")]
    Stopped,
    #[error(transparent)]
    Engine(#[from] EngineError),
}

#[derive(Debug)]
enum Command {
    Join { membership: Membership, wish: Wish, reply: oneshot::Sender<Result<(), UpdateError>> },
    Receive { push: Push, reply: oneshot::Sender<Result<Pushed, UpdateError>> },
    ReleaseSpare { reply: oneshot::Sender<Result<(), UpdateError>> },
}

/// Whether a join is still wanted.
#[derive(Debug, Clone)]
struct Wish {
    /// Of this join, and of the newest one.
    number: u64,
    newest: Arc<AtomicU64>,
    /// Lives as long as the caller waits.
    caller: Weak<()>,
}

impl Wish {
    fn is_over(&self) -> bool {
        self.caller.strong_count() == 0 || self.newest.load(Ordering::SeqCst) > self.number
    }
}

/// The way to the receiving thread, which ends when this is dropped.
#[derive(Debug)]
pub struct WeightReceiver {
    commands: mpsc::Sender<Command>,
    /// The group that is in use, so that it can be aborted while the thread waits in it.
    current: Arc<Mutex<Option<Arc<ProcessGroup>>>>,
    /// Number of the newest join, which ends those before it.
    newest: Arc<AtomicU64>,
}

impl WeightReceiver {
    /// Starts the thread; `runtime` runs what it asks of `engine`.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        config: &ModelConfig,
        format: WeightFormat,
        engine: EngineHandle<DeviceWeights>,
        runtime: Handle,
    ) -> anyhow::Result<Self> {
        let (commands, incoming) = mpsc::channel(MAX_WAITING);
        let current = Arc::default();
        let worker = Worker {
            manifest: config.manifest(),
            config: config.clone(),
            format,
            engine,
            runtime,
            pool: Pool::new(1)?,
            current: Arc::clone(&current),
            joined: None,
            spare: None,
        };
        std::thread::Builder::new().name("weights".to_owned()).spawn(move || worker.run(incoming))?;
        Ok(Self { commands, current, newest: Arc::default() })
    }

    /// Enters a group; whichever was in use, or about to be, is left, even in the middle of a push. Given up when this
    /// future is dropped.
    ///
    /// # Errors
    /// If the trainers have another model, or the members do not come together in time.
    pub async fn join(&self, membership: Membership) -> Result<(), UpdateError> {
        let caller = Arc::new(());
        let number = 1 + self.newest.fetch_add(1, Ordering::SeqCst);
        let wish = Wish { number, newest: Arc::clone(&self.newest), caller: Arc::downgrade(&caller) };
        self.abort("this generator was asked to join another group");
        let (reply, answer) = oneshot::channel();
        self.send(Command::Join { membership, wish, reply })?;
        let joined = answer.await.unwrap_or(Err(UpdateError::Stopped));
        drop(caller);
        joined
    }

    /// Receives a push and puts it in place.
    ///
    /// # Errors
    /// Says why the old weights go on serving.
    pub async fn receive(&self, push: Push) -> Result<Pushed, UpdateError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Receive { push, reply })?;
        answer.await.unwrap_or(Err(UpdateError::Stopped))
    }

    /// Gives the memory that only pushes need back, until the next one: of the weights that do not serve, and of the buckets.
    ///
    /// # Errors
    /// If too many joins and pushes wait, or the thread has stopped.
    pub async fn release_spare(&self) -> Result<(), UpdateError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::ReleaseSpare { reply })?;
        answer.await.unwrap_or(Err(UpdateError::Stopped))
    }

    /// The group that it receives pushes in.
    #[must_use]
    pub fn group(&self) -> Option<String> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|group| group.name().to_owned())
    }

    /// Ends whatever the thread waits for in its group.
    pub fn abort(&self, reason: &str) {
        if let Some(group) = self.current.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            group.abort(reason);
        }
    }

    fn send(&self, command: Command) -> Result<(), UpdateError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => UpdateError::Busy,
            mpsc::error::TrySendError::Closed(_) => UpdateError::Stopped,
        })
    }
}

/// The thread.
struct Worker {
    config: ModelConfig,
    manifest: Manifest,
    format: WeightFormat,
    engine: EngineHandle<DeviceWeights>,
    runtime: Handle,
    /// One thread: packing must not take turns with the engine's kernels.
    pool: Pool,
    current: Arc<Mutex<Option<Arc<ProcessGroup>>>>,
    joined: Option<Joined>,
    /// The set that does not serve; there is none before the first push, nor after one that found no weights to replace.
    spare: Option<DeviceWeights>,
}

/// A group and how weights come through it.
struct Joined {
    group: Arc<ProcessGroup>,
    buckets: Vec<Bucket>,
    /// Holds two units, one after the other and at both ends in turn: while one is unpacked, the next one comes.
    buffer: Tensor,
}

impl Joined {
    /// The memory of a unit, which those before and after it do not touch.
    fn place(&self, unit_idx: usize, numel: usize) -> Tensor {
        let at_the_end = (self.buffer.numel() - numel) / ALIGNMENT * ALIGNMENT;
        let start = if unit_idx.is_multiple_of(2) { 0 } else { at_the_end };
        self.buffer.narrow(0, start as i64, numel as i64)
    }

    fn receive(&self, bucket: &Bucket, manifest: &Manifest) -> Result<Work, CommError> {
        let unit = self.place(bucket.unit_idx, manifest.units[bucket.unit_idx].numel());
        self.group.broadcast_async(&mut unit.narrow(0, bucket.offset as i64, bucket.numel as i64), bucket.owner)
    }
}

/// Elements for any two units that come one after the other.
fn numel_of_neighbours(manifest: &Manifest) -> usize {
    let numels: Vec<usize> = manifest.units.iter().map(|unit| unit.numel().next_multiple_of(ALIGNMENT)).collect();
    numels.windows(2).map(|pair| pair[0] + pair[1]).max().unwrap_or_else(|| numels.iter().sum())
}

impl Worker {
    fn run(mut self, mut incoming: mpsc::Receiver<Command>) {
        // A caller that no longer waits for its answer does not change what was done.
        while let Some(command) = incoming.blocking_recv() {
            match command {
                Command::Join { membership, wish, reply } => drop(reply.send(self.join(&membership, &wish))),
                Command::Receive { push, reply } => drop(reply.send(self.take_push(&push))),
                Command::ReleaseSpare { reply } => {
                    self.spare = None;
                    if let Some(joined) = &mut self.joined {
                        // Memory that was not written to yet takes none.
                        joined.buffer = joined.buffer.empty_like();
                    }
                    drop(reply.send(Ok(())));
                }
            }
        }
    }

    fn join(&mut self, membership: &Membership, wish: &Wish) -> Result<(), UpdateError> {
        self.joined = None;
        self.set_current(None);
        let (theirs, ours) = (membership.manifest_hash, self.manifest.hash());
        if theirs != ours {
            return Err(UpdateError::OtherManifest { theirs, ours });
        }
        if membership.kind != self.format.pushed {
            return Err(UpdateError::OtherKind { theirs: membership.kind, ours: self.format.pushed });
        }
        let backend = match (membership.is_nccl, self.format.device) {
            (false, _) => Backend::Gloo,
            (true, Device::Cuda(device)) => Backend::Nccl { device },
            (true, device) => return Err(UpdateError::NoGpu { device }),
        };
        let group = Arc::new(meet(backend, membership, wish)?);
        self.set_current(Some(Arc::clone(&group)));
        let numel = numel_of_neighbours(&self.manifest) as i64;
        self.joined = Some(Joined {
            buckets: self.manifest.buckets(membership.num_trainers, membership.bucket_numel),
            buffer: Tensor::empty([numel], (self.format.pushed, group.device())),
            group,
        });
        Ok(())
    }

    fn take_push(&mut self, push: &Push) -> Result<Pushed, UpdateError> {
        let started = Instant::now();
        self.fill_spare(push)?;
        let receive = started.elapsed();
        let weights = self.spare.take().ok_or(UpdateError::Stopped)?;
        let swapped = self.runtime.block_on(self.engine.swap(weights, push.version))?;
        self.spare = swapped.spare;
        let swap = swapped.stood_still;
        tracing::debug!(
            version = push.version.0,
            receive_s = receive.as_secs_f64(),
            swap_s = swap.as_secs_f64(),
            "new weights serve"
        );
        Ok(Pushed { receive, swap })
    }

    /// Receives all buckets, even past a unit that is wrong: the other members are sending them all. One is always on its
    /// way while what has come is checked and packed.
    fn fill_spare(&mut self, push: &Push) -> Result<(), UpdateError> {
        let Self { config, manifest, format, pool, joined, spare, .. } = self;
        let joined = joined.as_ref().filter(|joined| joined.group.name() == push.group);
        let joined = joined.ok_or_else(|| UpdateError::NotJoined(push.group.clone()))?;
        if push.unit_hashes.len() != manifest.units.len() {
            let (got, units) = (push.unit_hashes.len(), manifest.units.len());
            return Err(UpdateError::WrongNumberOfHashes { got, units });
        }
        let mut outcome = Ok(());
        if spare.is_none() {
            let empty = DeviceWeights::empty(config, *format).map(|set| *spare = Some(set));
            outcome = empty.map_err(UpdateError::Weights);
        }
        let mut buckets = joined.buckets.iter();
        let mut start_next = || buckets.next().map(|next| joined.receive(next, manifest).map(|work| (next, work)));
        let mut on_its_way = start_next().transpose()?;
        while let Some((bucket, work)) = on_its_way {
            on_its_way = start_next().transpose()?;
            work.wait()?;
            let unit = &manifest.units[bucket.unit_idx];
            if bucket.offset + bucket.numel < unit.numel() || outcome.is_err() {
                continue;
            }
            let flat = joined.place(bucket.unit_idx, unit.numel());
            let (got, announced) = (xxh3_64(bytes(&flat.to_device(Device::Cpu))), push.unit_hashes[bucket.unit_idx]);
            if got != announced {
                outcome = Err(UpdateError::BadHash { unit: unit.name.clone(), got, announced });
            } else if let Some(spare) = spare {
                let params = split(&flat, manifest, bucket.unit_idx);
                outcome = spare.set_unit(bucket.unit_idx, params, pool).map_err(UpdateError::Weights);
            }
        }
        outcome
    }

    fn set_current(&self, group: Option<Arc<ProcessGroup>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = group;
    }
}

/// Enters the group within the membership's limit, as long as that is wanted.
fn meet(backend: Backend, membership: &Membership, wish: &Wish) -> Result<ProcessGroup, UpdateError> {
    let Membership { store_host, store_port, limit, timeout, .. } = membership;
    let started = Instant::now();
    let rest = || limit.saturating_sub(started.elapsed());
    let wish = wish.clone();
    let store = Store::connect_unless(store_host, *store_port, *limit, move || wish.is_over())?;
    // The address under which this machine reaches the store, and is reached by those around it.
    let own = address_towards(store_host, *store_port, rest());
    let no_address = |source| UpdateError::NoAddress { store: format!("{store_host}:{store_port}"), source };
    let spec = GroupSpec {
        name: membership.group.clone(),
        rank: membership.rank,
        size: membership.size,
        timeout: *timeout,
        address: Address::Host(own.map_err(no_address)?.to_string()),
    };
    Ok(ProcessGroup::meet(backend, &store, &spec, rest())?)
}
