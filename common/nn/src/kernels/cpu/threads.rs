//! The threads that kernels run on.

use super::simd::Isa;
use rayon::prelude::*;

/// Work below this is done by the calling thread: waking another one costs about as much.
const MIN_PARALLEL_NANOS: usize = 10_000;
/// Tasks are handed out in about this many pieces per thread, so that a thread that was held up can be helped.
const PIECES_PER_THREAD: usize = 4;

/// A fixed number of threads and the instruction set they use. Results never depend on the number of threads.
///
/// A caller that runs many kernels in a row should do so inside [`Pool::install`]: it then is one of the threads,
/// and the others stay awake between the kernels.
#[derive(Debug)]
pub struct Pool {
    /// None for a single thread: the caller's own.
    workers: Option<rayon::ThreadPool>,
    isa: Isa,
}

/// The operating system refused to start the threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {num_threads} kernel threads, ask for fewer")]
pub struct PoolError {
    num_threads: usize,
    source: rayon::ThreadPoolBuildError,
}

impl Pool {
    /// `num_threads` threads, at least one, on the best instruction set of this CPU.
    pub fn new(num_threads: usize) -> Result<Self, PoolError> {
        Self::with_isa(num_threads, Isa::detect())
    }

    /// As [`Pool::new`], on a chosen instruction set.
    pub fn with_isa(num_threads: usize, isa: Isa) -> Result<Self, PoolError> {
        let build = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(num_threads)
                .thread_name(|i| format!("kernel-{i}"))
                .build()
                .map_err(|source| PoolError { num_threads, source })
        };
        let workers = if num_threads > 1 { Some(build()?) } else { None };
        Ok(Self { workers, isa })
    }

    pub fn num_threads(&self) -> usize {
        self.workers.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `operation` on one of the threads and waits for it.
    pub fn install<R: Send>(&self, operation: impl FnOnce() -> R + Send) -> R {
        match &self.workers {
            Some(workers) => workers.install(operation),
            None => operation(),
        }
    }

    /// Calls `task` with every number below `num_tasks`, each about `task_nanos` long, and waits for all of them.
    pub(super) fn for_each(&self, num_tasks: usize, task_nanos: usize, task: impl Fn(usize) + Sync + Send) {
        match self.divide(num_tasks, task_nanos) {
            Some((workers, piece)) => {
                workers.install(|| (0..num_tasks).into_par_iter().with_min_len(piece).for_each(task));
            }
            None => (0..num_tasks).for_each(task),
        }
    }

    /// Calls `task` with every item and its index, each about `task_nanos` long, and waits for all of them.
    pub(super) fn for_each_mut<T: Send>(
        &self,
        items: &mut [T],
        task_nanos: usize,
        task: impl Fn(usize, &mut T) + Sync + Send,
    ) {
        match self.divide(items.len(), task_nanos) {
            Some((workers, piece)) => workers.install(|| {
                items.par_iter_mut().with_min_len(piece).enumerate().for_each(|(i, item)| task(i, item));
            }),
            None => items.iter_mut().enumerate().for_each(|(i, item)| task(i, item)),
        }
    }

    /// The threads to divide the tasks among and how many to hand out at once; None where it is not worth it.
    fn divide(&self, num_tasks: usize, task_nanos: usize) -> Option<(&rayon::ThreadPool, usize)> {
        let workers = self.workers.as_ref()?;
        let piece = (num_tasks / (workers.current_num_threads() * PIECES_PER_THREAD)).max(1);
        let worthwhile = num_tasks > 1 && num_tasks.saturating_mul(task_nanos) >= MIN_PARALLEL_NANOS;
        worthwhile.then_some((workers, piece))
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
