//! What a push is compared with: plain broadcasts by Gloo, among processes that do nothing else.

use std::process::Child;
use std::time::{Duration, Instant};

use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::commands::bench::generator_process::own_binary;

/// Of one broadcast: the largest that a push makes.
const BUCKET_BYTES: i64 = 256 << 20;
const HOST: &str = "127.0.0.1";
const TIMEOUT: Duration = Duration::from_secs(600);

/// One process of the group.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Broadcasts {
    rank: usize,
    size: usize,
    port: u16,
    bytes: i64,
    rounds: usize,
}

impl Broadcasts {
    /// Takes part until all rounds are done.
    pub(super) fn follow(&self) -> Result<()> {
        let store = Store::connect(HOST, self.port, TIMEOUT)?;
        let member = self.join(&store)?;
        // And the one that warms up.
        (0..=self.rounds).try_for_each(|_| member.round().map(drop))
    }

    fn join(&self, store: &Store) -> Result<Member> {
        let address = Address::Host(HOST.to_owned());
        let name = "broadcasts".to_owned();
        let spec = GroupSpec { name, rank: self.rank, size: self.size, timeout: TIMEOUT, address };
        let group = ProcessGroup::new(Backend::Gloo, store, &spec)?;
        Ok(Member { group, buffer: Tensor::zeros([self.bytes], (Kind::Uint8, Device::Cpu)) })
    }
}

struct Member {
    group: ProcessGroup,
    /// `[bytes]`
    buffer: Tensor,
}

impl Member {
    /// The time from when all begin until all have everything.
    fn round(&self) -> Result<Duration> {
        self.group.barrier()?;
        let started = Instant::now();
        for mut bucket in self.buffer.split(BUCKET_BYTES, 0) {
            self.group.broadcast(&mut bucket, 0)?;
        }
        self.group.barrier()?;
        Ok(started.elapsed())
    }
}

/// Rank 0, and the other processes, which end with it.
pub(super) struct BroadcastGroup {
    own: Member,
    others: Vec<Child>,
    _store: Store,
}

impl BroadcastGroup {
    /// Starts `size - 1` processes, for so many rounds of so many bytes.
    pub(super) fn start(size: usize, bytes: u64, rounds: usize) -> Result<Self> {
        let store = Store::host(HOST, 0, TIMEOUT)?;
        let own = Broadcasts { rank: 0, size, port: store.port(), bytes: i64::try_from(bytes)?, rounds };
        let start = |rank| {
            let message = serde_json::to_string(&Broadcasts { rank, ..own })?;
            own_binary()?
                .args(["bench", "push", "--peer", &message])
                .spawn()
                .context("starting a process to broadcast to")
        };
        let others = (1..size).map(start).collect::<Result<_>>()?;
        let group = Self { own: own.join(&store)?, others, _store: store };
        group.round()?;
        Ok(group)
    }

    pub(super) fn round(&self) -> Result<Duration> {
        self.own.round()
    }
}

impl Drop for BroadcastGroup {
    fn drop(&mut self) {
        for child in &mut self.others {
            // After the last round they end by themselves.
            drop(child.kill());
            drop(child.wait());
        }
    }
}
