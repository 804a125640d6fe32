//! The threads of the OpenMP runtime that torch already computes with.
//!
//! After an operator of torch they wait for the next one without sleeping, so they begin at once, where threads of our own would
//! first have to be woken and then share the processor with theirs.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::ForkLocal;

/// `GOMP_parallel`, which compilers call for every parallel region: run a function on a team of threads, the calling one among
/// them. GNU's runtime and LLVM's both have it.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// A way to run something on all threads of the runtime.
#[derive(Clone, Copy)]
pub(super) struct Team(Parallel);

/// The process that loaded this library.
static FIRST_PROCESS: AtomicU32 = AtomicU32::new(0);

/// Note which process this is, before anyone can fork. Returns whether it is the first.
pub(super) fn is_first_process() -> bool {
    let this = std::process::id();
    let first = FIRST_PROCESS.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed);
    first.is_ok() || first == Err(this)
}

/// The runtime of this process. None in a forked child: the runtime would wait there for threads of its parent.
pub(super) fn team() -> Option<Team> {
    static TEAM: ForkLocal<Option<Team>> = ForkLocal::new();
    *TEAM.get_or_init(|| if is_first_process() { find() } else { None })
}

#[cfg(unix)]
fn find() -> Option<Team> {
    // SAFETY: the name is a C string; looking a symbol up has no other effect.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
    log::debug!("threads: {}", if symbol.is_null() { "our own" } else { "those of OpenMP" });
    // SAFETY: the symbol is a function of this type in every runtime that has it.
    (!symbol.is_null()).then(|| Team(unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) }))
}

#[cfg(not(unix))]
fn find() -> Option<Team> {
    None
}

/// What the threads of a team share.
struct Job<'a> {
    caller: ThreadId,
    /// Threads beside the calling one that may still join.
    free: AtomicUsize,
    on_caller: &'a dyn Fn(),
    on_others: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Team {
    /// Run `on_caller` on the calling thread and `on_others` on up to `others` threads beside it, and wait for them. `threads` is
    /// how large the team is: always as large as torch's, because the runtime ends and starts threads when that changes.
    ///
    /// # Panics
    /// With the panic of any of them.
    pub(super) fn run(
        self,
        threads: usize,
        others: usize,
        on_caller: &dyn Fn(),
        on_others: &(dyn Fn() + Sync),
    ) {
        let job = Job {
            caller: thread::current().id(),
            free: AtomicUsize::new(others),
            on_caller,
            on_others,
            panic: Mutex::new(None),
        };
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: the runtime calls `work` with the job, which outlives the call, and lets no thread leave it behind.
        unsafe { (self.0)(work, (&raw const job).cast_mut().cast(), threads, 0) };
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

extern "C" fn work(job: *mut c_void) {
    // SAFETY: `run` passes a job that lives until every thread has returned.
    let job: &Job = unsafe { &*job.cast_const().cast() };
    // A panic must not cross the frames of the runtime.
    let result = catch_unwind(AssertUnwindSafe(|| {
        if thread::current().id() == job.caller {
            (job.on_caller)();
        } else if job
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1))
            .is_ok()
        {
            (job.on_others)();
        }
    }));
    if let Err(panic) = result {
        *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a runtime does, with threads of its own.
    unsafe extern "C" fn parallel(
        work: extern "C" fn(*mut c_void),
        job: *mut c_void,
        threads: c_uint,
        _flags: c_uint,
    ) {
        let job = job as usize;
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(move || work(job as *mut c_void));
            }
            work(job as *mut c_void);
        });
    }

    #[test]
    fn the_caller_works_and_no_more_others_than_asked_for() {
        for (threads, others) in [(1, 0), (2, 1), (5, 2), (3, 7)] {
            let (calls, helped) = (std::cell::Cell::new(0), AtomicUsize::new(0));
            let on_caller = || calls.set(calls.get() + 1);
            let on_others = || _ = helped.fetch_add(1, Ordering::Relaxed);
            Team(parallel).run(threads, others, &on_caller, &on_others);
            assert_eq!(calls.get(), 1);
            assert_eq!(helped.into_inner(), others.min(threads - 1));
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_after_all_have_stopped() {
        for caller_panics in [true, false] {
            let finished = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                let work = |panics: bool| {
                    assert!(!panics, "on purpose");
                    finished.fetch_add(1, Ordering::Relaxed);
                };
                Team(parallel).run(2, 1, &|| work(caller_panics), &|| work(!caller_panics));
            }));
            let message = *result.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!((message, finished.into_inner()), ("on purpose", 1));
        }
    }
}
