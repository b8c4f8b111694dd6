//! Threads that work on one job at a time and wait for the next one awake.
//!
//! A step of decoding is a hundred jobs of some microseconds each, with short stretches of serial work between them.
//! A thread that went to sleep in such a stretch would cost more to wake than the job takes, so as long as a caller is
//! [engaged](Team::engage) the threads spin; otherwise they sleep.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Looks at a changing number before a waiting thread lets others run, or goes to sleep: some 50 microseconds.
const SPINS: u32 = 2000;

/// The calling thread and its helpers.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller whose job is worked on.
    turn: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// Tasks that nobody has begun; the caller's share comes first.
    shares: Box<[Share]>,
    task: UnsafeCell<Task>,
    /// Tasks of the job that are begun at once.
    piece: AtomicU32,
    /// Tasks of the job that are not done.
    num_left: AtomicUsize,
    /// Changes with every job.
    job_number: AtomicU32,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Callers that will have more jobs soon.
    num_engaged: AtomicUsize,
    is_closed: AtomicBool,
    /// Helpers sleep here while nobody is engaged; so many do.
    num_asleep: Mutex<usize>,
    alarm: Condvar,
}

// SAFETY: `task` is written by the caller whose turn it is, while none is left to begin, and read by those who have begun
// one; the atomic operations on the shares order the two. What it refers to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// Consecutive tasks, `first | end << 32`. On a pair of cache lines of its own, as processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share(AtomicU64);

/// What to do with the number of a task.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Task({:p})", self.0)
    }
}

/// Keeps the helpers awake.
pub(super) struct Engagement<'a>(&'a Shared);

impl Team {
    /// # Errors
    /// If the system refuses a thread.
    pub(super) fn new(num_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            shares: (0..num_threads).map(|_| Share::default()).collect(),
            task: UnsafeCell::new(Task(&|_| ())),
            piece: AtomicU32::new(1),
            num_left: AtomicUsize::new(0),
            job_number: AtomicU32::new(0),
            panic: Mutex::new(None),
            num_engaged: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            num_asleep: Mutex::new(0),
            alarm: Condvar::new(),
        });
        let mut team = Self { shared, helpers: Vec::new(), turn: Mutex::new(()) };
        for idx in 1..num_threads {
            let shared = Arc::clone(&team.shared);
            let helper = thread::Builder::new().name(format!("kernel-{idx}"));
            team.helpers.push(helper.spawn(move || shared.help(idx))?);
        }
        Ok(team)
    }

    pub(super) fn num_threads(&self) -> usize {
        self.shared.shares.len()
    }

    /// Wakes the helpers, and keeps them awake until the result is dropped.
    pub(super) fn engage(&self) -> Engagement<'_> {
        self.shared.num_engaged.fetch_add(1, Ordering::SeqCst);
        self.shared.wake();
        Engagement(&self.shared)
    }

    /// Calls `task` with every number below `num_tasks`, in pieces of `piece` consecutive ones, and waits for all of
    /// them; on the calling thread alone while another job is worked on, as when it is a task of that job which calls.
    ///
    /// # Panics
    /// If a task does, once no task is running any more.
    pub(super) fn run(&self, num_tasks: u32, piece: u32, task: &(dyn Fn(usize) + Sync)) {
        let Ok(turn) = self.turn.try_lock() else {
            return (0..num_tasks as usize).for_each(task);
        };
        let _engagement = self.engage();
        let shared = &*self.shared;
        // SAFETY: the lifetime is extended to that of the job, which ends before this function returns.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: it is this caller's turn, and no share has a task, so nobody reads it.
        unsafe { *shared.task.get() = Task(task) };
        shared.piece.store(piece, Ordering::Relaxed);
        shared.num_left.store(num_tasks as usize, Ordering::Relaxed);
        let num_shares = shared.shares.len() as u64;
        let bound = |share: u64| u64::from(num_tasks) * share / num_shares;
        for (share, idx) in shared.shares.iter().zip(0..) {
            share.0.store(bound(idx) | bound(idx + 1) << 32, Ordering::Release);
        }
        shared.job_number.fetch_add(1, Ordering::Release);
        shared.work(0);
        wait_while(|| shared.num_left.load(Ordering::Acquire) > 0);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        self.shared.wake();
        for helper in self.helpers.drain(..) {
            // Panics of tasks were passed on to their callers.
            drop(helper.join());
        }
    }
}

impl Drop for Engagement<'_> {
    fn drop(&mut self) {
        self.0.num_engaged.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    /// The life of helper `idx`.
    fn help(&self, idx: usize) {
        while !self.is_closed.load(Ordering::SeqCst) {
            let job_number = self.job_number.load(Ordering::Acquire);
            self.work(idx);
            let is_idle = || self.job_number.load(Ordering::Acquire) == job_number;
            wait_while(|| is_idle() && self.is_engaged());
            // The next step may be about to begin.
            if (0..SPINS).all(|_| {
                spin_loop();
                is_idle() && !self.is_engaged()
            }) {
                self.sleep();
            }
        }
    }

    fn is_engaged(&self) -> bool {
        self.num_engaged.load(Ordering::SeqCst) > 0
    }

    fn sleep(&self) {
        let mut num_asleep = lock(&self.num_asleep);
        while !self.is_engaged() && !self.is_closed.load(Ordering::SeqCst) {
            *num_asleep += 1;
            num_asleep = self.alarm.wait(num_asleep).unwrap_or_else(PoisonError::into_inner);
            *num_asleep -= 1;
        }
    }

    fn wake(&self) {
        // Whoever saw nothing to stay awake for sleeps by the time that the lock is free, and is counted.
        if *lock(&self.num_asleep) > 0 {
            self.alarm.notify_all();
        }
    }

    /// Performs the tasks of share `own`, then those that others have not come to.
    fn work(&self, own: usize) {
        let num_shares = self.shares.len();
        for offset in 0..num_shares {
            let share = &self.shares[(own + offset) % num_shares];
            let mut num_done = 0;
            while let Some(tasks) = self.begin(share, offset > 0) {
                num_done += tasks.len();
                // SAFETY: tasks were begun and are not done, so the pointer is not written, and what it refers to exists.
                let task = unsafe { &*(*self.task.get()).0 };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| tasks.for_each(task))) {
                    *lock(&self.panic) = Some(panic);
                }
            }
            if num_done > 0 {
                self.num_left.fetch_sub(num_done, Ordering::Release);
            }
        }
    }

    /// Takes a piece from the front of one's own share, or from the end of another's.
    fn begin(&self, share: &Share, is_others: bool) -> Option<Range<usize>> {
        let mut seen = share.0.load(Ordering::Acquire);
        loop {
            let (first, end) = (seen as u32, (seen >> 32) as u32);
            if first >= end {
                return None;
            }
            let piece = self.piece.load(Ordering::Relaxed).min(end - first);
            let (begun, left) = if is_others {
                (end - piece..end, first..end - piece)
            } else {
                (first..first + piece, first + piece..end)
            };
            let left = u64::from(left.start) | u64::from(left.end) << 32;
            match share.0.compare_exchange_weak(seen, left, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(begun.start as usize..begun.end as usize),
                Err(now) => seen = now,
            }
        }
    }
}

/// Spins, and lets other threads run from time to time should it take longer.
fn wait_while(condition: impl Fn() -> bool) {
    let mut spins = 0;
    while condition() {
        if spins < SPINS {
            spins += 1;
            spin_loop();
        } else {
            thread::yield_now();
        }
    }
}

/// A thread that panicked leaves nothing behind that others could not use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::testing::uniform;
    use super::*;

    /// Calls of each task of a job.
    fn calls(team: &Team, num_tasks: u32, piece: u32) -> Vec<u32> {
        let calls: Vec<AtomicU32> = (0..num_tasks).map(|_| AtomicU32::new(0)).collect();
        team.run(num_tasks, piece, &|i| {
            calls[i].fetch_add(1, Ordering::Relaxed);
        });
        calls.into_iter().map(AtomicU32::into_inner).collect()
    }

    fn wait_until_asleep(team: &Team, num_helpers: usize) {
        let start = Instant::now();
        while *lock(&team.shared.num_asleep) != num_helpers {
            assert!(start.elapsed() < Duration::from_secs(20), "not {num_helpers} helpers sleep");
            thread::yield_now();
        }
    }

    #[test]
    fn every_task_of_any_job_runs_once() {
        for num_threads in [2, 3, 8] {
            let team = Team::new(num_threads).unwrap();
            let mut state = num_threads as u64;
            let mut below = |bound: f64| (uniform(&mut state) * bound) as u32;
            for job in 0..2000 {
                let (num_tasks, piece) = (below(100.0), 1 + below(20.0));
                let seen = calls(&team, num_tasks, piece);
                assert!(seen.iter().all(|&calls| calls == 1), "job {job} of {num_tasks} by {piece}: {seen:?}");
                if job % 200 == 0 {
                    wait_until_asleep(&team, num_threads - 1);
                }
            }
        }
    }

    #[test]
    fn results_are_seen_when_a_job_is_done() {
        let team = Team::new(4).unwrap();
        let mut sums = vec![0_u64; 64];
        for round in 0..500 {
            let items: Vec<Mutex<&mut u64>> = sums.iter_mut().map(Mutex::new).collect();
            team.run(64, 1, &|i| **lock(&items[i]) += i as u64);
            drop(items);
            assert!(sums.iter().enumerate().all(|(i, sum)| *sum == (round + 1) * i as u64));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_other_tasks() {
        let team = Team::new(3).unwrap();
        let num_done = AtomicU32::new(0);
        let job = || {
            team.run(50, 1, &|i| {
                assert_ne!(i, 20, "task twenty");
                num_done.fetch_add(1, Ordering::Relaxed);
            });
        };
        let panic = catch_unwind(AssertUnwindSafe(job)).unwrap_err();
        assert!(panic.downcast_ref::<String>().unwrap().contains("task twenty"));
        assert_eq!(num_done.into_inner(), 49);
        assert_eq!(calls(&team, 9, 2), [1; 9]);
    }

    #[test]
    fn jobs_within_tasks_and_of_several_callers_are_all_done() {
        let team = Team::new(3).unwrap();
        let num_calls = AtomicU32::new(0);
        let count = |_| {
            num_calls.fetch_add(1, Ordering::Relaxed);
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| team.run(5, 1, &|_| team.run(3, 1, &count))));
            }
        });
        assert_eq!(num_calls.into_inner(), 4 * 100 * 5 * 3);
    }

    #[test]
    fn helpers_sleep_unless_somebody_is_engaged() {
        let team = Team::new(3).unwrap();
        wait_until_asleep(&team, 2);
        let engagement = team.engage();
        wait_until_asleep(&team, 0);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(20) {
            assert_eq!(*lock(&team.shared.num_asleep), 0);
        }
        drop(engagement);
        wait_until_asleep(&team, 2);
        assert_eq!(calls(&team, 10, 1), [1; 10]);
    }
}
