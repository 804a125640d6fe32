//! Threads: values that survive `fork` by being made anew, and one way to run independent tasks on a pool.
#![allow(unsafe_code)]

mod openmp;

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// How often the calling thread asks whether it should stop.
const POLL_EVERY: Duration = Duration::from_millis(25);

/// One value per process. A forked child gets a fresh one: the threads and locks inside its parent's copy belong to threads that
/// the child does not have, so that copy is leaked and never touched again.
///
/// There is no lock around the value for the same reason: another thread could hold it at the moment of the fork.
pub struct ForkLocal<T> {
    slot: AtomicPtr<Slot<T>>,
}

struct Slot<T> {
    process: u32,
    value: T,
}

impl<T> ForkLocal<T> {
    /// An empty cell, usable in a `static`.
    pub const fn new() -> Self {
        ForkLocal { slot: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl<T: Send + Sync> ForkLocal<T> {
    /// This process's value. Threads that meet in the first call may each run `init`; all of them get the same result.
    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        let process = std::process::id();
        let current = self.slot.load(Ordering::Acquire);
        // SAFETY: a non-null pointer in the slot came from `Box::into_raw` and is only freed by `drop(&mut self)`.
        if let Some(slot) = unsafe { current.as_ref() }
            && slot.process == process
        {
            return &slot.value;
        }
        let fresh = Box::into_raw(Box::new(Slot { process, value: init() }));
        let winner = match self.slot.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => fresh,
            Err(winner) => {
                // SAFETY: `fresh` was never published, so this thread still owns it.
                drop(unsafe { Box::from_raw(fresh) });
                winner
            }
        };
        // SAFETY: as above; only this process's threads can have replaced what was in the slot.
        unsafe { &(*winner).value }
    }
}

impl<T> Default for ForkLocal<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for ForkLocal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForkLocal").finish_non_exhaustive()
    }
}

impl<T> Drop for ForkLocal<T> {
    fn drop(&mut self) {
        let slot = *self.slot.get_mut();
        // SAFETY: `&mut self` means nobody borrows the value; another process's value is left alone.
        unsafe {
            if slot.as_ref().is_some_and(|slot| slot.process == std::process::id()) {
                drop(Box::from_raw(slot));
            }
        }
    }
}

/// Call when the library is loaded: a process forked from this one computes on threads of its own.
pub fn note_process() {
    openmp::is_first_process();
}

/// Whether to give up. Asked only on the thread that started the work, because only that thread may talk to Python.
pub trait Interrupt {
    /// `true` to stop as soon as possible.
    fn poll(&self) -> bool;
}

/// Never interrupts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Never;

impl Interrupt for Never {
    fn poll(&self) -> bool {
        false
    }
}

impl<F: Fn() -> bool> Interrupt for F {
    fn poll(&self) -> bool {
        self()
    }
}

/// The right to use so many threads, the calling one among them. Only a number: the threads themselves are those of the OpenMP
/// runtime that torch computes with, or where there is none are shared by every `Pool` of the same size in this process, and start
/// with the first work that needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    threads: usize,
    used: usize,
}

impl Pool {
    /// A pool of `num_threads` threads; 0 counts as 1.
    pub fn of(num_threads: usize) -> Self {
        let threads = num_threads.max(1);
        Pool { threads, used: threads }
    }

    /// The same pool using no more than `threads` of its threads, for work too small to be worth waking the others.
    #[must_use]
    pub fn at_most(self, threads: usize) -> Self {
        Pool { used: self.used.min(threads.max(1)), ..self }
    }

    /// How many tasks may run at the same time.
    pub fn parallelism(self) -> usize {
        self.used
    }

    /// Run `task(scratch, index)` for every index below `tasks`, in any order, on any thread, each exactly once.
    ///
    /// Every thread that takes part makes one scratch. Threads take runs of neighbouring tasks, long ones first, so that what
    /// one task leaves in a core's cache serves the next. `task` must write only what its index owns: then the result does not
    /// depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `interrupt` said so; some tasks then did not run.
    ///
    /// # Panics
    /// With the panic of a task, after all threads have stopped.
    pub fn run<S>(
        &self,
        tasks: usize,
        make_scratch: impl Fn() -> S + Sync,
        task: impl Fn(&mut S, usize) + Sync,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let threads = self.used.min(tasks).max(1);
        let queue = Queue { next: AtomicUsize::new(0), end: tasks, threads, stopped: AtomicBool::new(false) };
        let last_poll = Cell::new(Instant::now());
        let on_this_thread = || {
            queue.work(&make_scratch, &task, || {
                last_poll.get().elapsed() >= POLL_EVERY && {
                    last_poll.set(Instant::now());
                    interrupt.poll()
                }
            });
        };
        let on_others = || queue.work(&make_scratch, &task, || false);
        if threads == 1 {
            on_this_thread();
        } else if let Some(team) = openmp::team() {
            team.run(self.threads, threads - 1, &on_this_thread, &on_others);
        } else if let Some(workers) = workers(self.threads) {
            workers.in_place_scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(|_| on_others());
                }
                on_this_thread();
            });
        } else {
            on_this_thread();
        }
        if queue.stopped.into_inner() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Tasks not yet taken.
struct Queue {
    next: AtomicUsize,
    end: usize,
    threads: usize,
    stopped: AtomicBool,
}

impl Queue {
    fn work<S>(
        &self,
        make_scratch: impl Fn() -> S,
        task: impl Fn(&mut S, usize),
        mut should_stop: impl FnMut() -> bool,
    ) {
        let _guard = StopOnPanic(&self.stopped);
        let mut scratch = None;
        while let Some(range) = self.take() {
            let scratch = scratch.get_or_insert_with(&make_scratch);
            for index in range {
                if self.stopped.load(Ordering::Relaxed) {
                    return;
                }
                task(scratch, index);
                if should_stop() {
                    self.stopped.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// A quarter of this thread's fair share of what is left: few visits to the counter, and an even finish.
    fn take(&self) -> Option<Range<usize>> {
        let share = |taken: usize| ((self.end - taken) / (4 * self.threads)).max(1);
        let start = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < self.end).then(|| taken + share(taken))
            })
            .ok()?;
        Some(start..start + share(start))
    }
}

/// What `threads` threads take for tasks of these costs, the first idle one always taking next: for tests of how work is cut on
/// machines that are not at hand.
#[cfg(test)]
pub(crate) fn simulate(costs: &[usize], threads: usize) -> usize {
    let queue = Queue {
        next: AtomicUsize::new(0),
        end: costs.len(),
        threads: threads.min(costs.len()).max(1),
        stopped: AtomicBool::new(false),
    };
    let mut busy_until = vec![0; queue.threads];
    while let Some(range) = queue.take() {
        let idle = busy_until.iter_mut().min().expect("there is a thread");
        *idle += costs[range].iter().sum::<usize>();
    }
    busy_until.into_iter().max().unwrap_or(0)
}

/// Makes the other threads stop early when this one panics.
struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// The threads beside the calling one of a pool of `threads`, or `None` where the system refuses to start them.
fn workers(threads: usize) -> Option<Arc<ThreadPool>> {
    static POOLS: ForkLocal<Mutex<HashMap<usize, Arc<ThreadPool>>>> = ForkLocal::new();
    let pools = || POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools().get(&threads) {
        return Some(Arc::clone(pool));
    }
    // Logging may wait for Python, so the lock is not held here; of two pools built at once the later is dropped.
    let built = ThreadPoolBuilder::new()
        .num_threads(threads - 1)
        .thread_name(|index| format!("sparse-mhsa-{index}"))
        .build();
    match built {
        Ok(pool) => {
            log::debug!("started {} threads beside the calling one", threads - 1);
            Some(Arc::clone(pools().entry(threads).or_insert(Arc::new(pool))))
        }
        Err(error) => {
            log::warn!("cannot start {} threads, working on one: {error}", threads - 1);
            None
        }
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
