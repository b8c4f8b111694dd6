//! The threads that kernels run on.

use super::simd::Isa;
use super::team::Team;

/// Work below this is done by the calling thread: handing some of it to another one costs about as much.
const MIN_PARALLEL_NANOS: usize = 5_000;
/// Tasks are begun in pieces of about this length, but so that a thread that is held up can be helped.
const PIECE_NANOS: usize = 2_000;
const PIECES_PER_THREAD: usize = 4;

/// A fixed number of threads and the instruction set they use. Results never depend on the number of threads.
///
/// A caller that runs many kernels in a row should do so inside [`Pool::install`]: the other threads then stay awake
/// between the kernels.
#[derive(Debug)]
pub struct Pool {
    /// None for a single thread: the caller's own.
    team: Option<Team>,
    isa: Isa,
}

/// The operating system refused to start the threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {num_threads} kernel threads, ask for fewer")]
pub struct PoolError {
    num_threads: usize,
    source: std::io::Error,
}

impl Pool {
    /// `num_threads` threads, at least one, on the best instruction set of this CPU.
    pub fn new(num_threads: usize) -> Result<Self, PoolError> {
        Self::with_isa(num_threads, Isa::detect())
    }

    /// As [`Pool::new`], on a chosen instruction set.
    pub fn with_isa(num_threads: usize, isa: Isa) -> Result<Self, PoolError> {
        let new_team = || Team::new(num_threads).map_err(|source| PoolError { num_threads, source });
        Ok(Self { team: (num_threads > 1).then(new_team).transpose()?, isa })
    }

    pub fn num_threads(&self) -> usize {
        self.team.as_ref().map_or(1, Team::num_threads)
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `operation` on the calling thread while the others stay awake.
    pub fn install<R>(&self, operation: impl FnOnce() -> R) -> R {
        let _engagement = self.team.as_ref().map(Team::engage);
        operation()
    }

    /// Calls `task` with every number below `num_tasks`, each about `task_nanos` long, and waits for all of them.
    pub(super) fn for_each(&self, num_tasks: usize, task_nanos: usize, task: impl Fn(usize) + Sync) {
        let is_worthwhile = num_tasks > 1 && num_tasks.saturating_mul(task_nanos) >= MIN_PARALLEL_NANOS;
        match &self.team {
            Some(team) if is_worthwhile => {
                let most = num_tasks / (team.num_threads() * PIECES_PER_THREAD);
                let piece = (PIECE_NANOS / task_nanos.max(1)).min(most).max(1);
                team.run(num_tasks as u32, piece as u32, &task);
            }
            _ => (0..num_tasks).for_each(task),
        }
    }

    /// Calls `task` with every item and its index, each about `task_nanos` long, and waits for all of them.
    pub(super) fn for_each_mut<T: Send>(
        &self,
        items: &mut [T],
        task_nanos: usize,
        task: impl Fn(usize, &mut T) + Sync,
    ) {
        let first = Items(items.as_mut_ptr());
        self.for_each(items.len(), task_nanos, |i| {
            // SAFETY: every item belongs to one task, and `items` is borrowed until all of them are done.
            let item = unsafe { &mut *first.get().add(i) };
            task(i, item);
        });
    }
}

/// Items that several threads write, each its own.
struct Items<T>(*mut T);

// SAFETY: whoever uses the pointer vouches for that, and the items may be sent to other threads.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_once_at_any_size() {
        for num_threads in [1, 2, 3] {
            let pool = Pool::new(num_threads).unwrap();
            assert_eq!(pool.num_threads(), num_threads);
            for (num_tasks, nanos) in [(0, 1), (1, 1_000_000), (7, 1), (100, 1_000_000)] {
                let calls: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(num_tasks, nanos, |i| {
                    calls[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                let mut items = vec![0; num_tasks];
                pool.for_each_mut(&mut items, nanos, |i, item| *item += i);
                assert!(items.into_iter().eq(0..num_tasks));
            }
        }
    }

    #[test]
    fn kernels_nest_inside_install() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        pool.install(|| {
            pool.for_each(10, 1_000_000, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
