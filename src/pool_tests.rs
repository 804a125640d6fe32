//! The pool runs every task once, stops when told to, and survives panics and forks.

use std::cell::Cell;
use std::sync::atomic::AtomicU32;
use std::thread::ThreadId;

use super::*;

#[test]
fn every_task_runs_once_whatever_the_number_of_threads() {
    for threads in [0, 1, 2, 3, 8] {
        for tasks in [0, 1, 2, 5, 1000] {
            let runs: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            let task = |(): &mut (), index: usize| {
                runs[index].fetch_add(1, Ordering::Relaxed);
            };
            Pool::of(threads).run(tasks, || (), task, &Never).unwrap();
            assert!(
                runs.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                "{threads} threads, {tasks} tasks"
            );
        }
    }
}

#[test]
fn a_thread_makes_one_scratch_and_only_when_it_works() {
    let made = AtomicUsize::new(0);
    let make = || made.fetch_add(1, Ordering::Relaxed);
    Pool::of(4).run(0, make, |_, _| {}, &Never).unwrap();
    assert_eq!(made.load(Ordering::Relaxed), 0);
    Pool::of(4).run(500, make, |_, _| std::thread::sleep(Duration::from_micros(50)), &Never).unwrap();
    assert!((1..=4).contains(&made.load(Ordering::Relaxed)));
}

fn threads_used(pool: Pool) -> Vec<ThreadId> {
    let ids = Mutex::new(Vec::new());
    let task = |(): &mut (), _: usize| {
        std::thread::sleep(Duration::from_millis(1));
        ids.lock().unwrap().push(std::thread::current().id());
    };
    pool.run(60, || (), task, &Never).unwrap();
    let mut ids = ids.into_inner().unwrap();
    ids.sort_by_key(|id| format!("{id:?}"));
    ids.dedup();
    ids
}

#[test]
fn one_thread_is_the_calling_one_and_more_work_beside_it() {
    let this = std::thread::current().id();
    assert_eq!(threads_used(Pool::of(1)), [this]);
    assert_eq!(threads_used(Pool::of(6).at_most(1)), [this]);
    let many = threads_used(Pool::of(3));
    assert!(many.len() == 3 && many.contains(&this), "{many:?}");
    assert!(threads_used(Pool::of(3).at_most(2)).len() <= 2);
}

#[test]
fn only_the_calling_thread_is_asked_and_all_stop_soon() {
    let caller = std::thread::current().id();
    for threads in [1, 4] {
        let polls = Cell::new(0);
        let interrupt = || {
            assert_eq!(std::thread::current().id(), caller);
            polls.set(polls.get() + 1);
            polls.get() == 3
        };
        let done = AtomicUsize::new(0);
        let task = |(): &mut (), _: usize| {
            std::thread::sleep(Duration::from_millis(1));
            done.fetch_add(1, Ordering::Relaxed);
        };
        let start = Instant::now();
        let result = Pool::of(threads).run(100_000, || (), task, &interrupt);
        assert_eq!(result, Err(Error::Interrupted));
        assert_eq!(polls.get(), 3);
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(done.load(Ordering::Relaxed) < 10_000);
    }
}

#[test]
fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
    for threads in [1, 2, 5] {
        for bad in [0, 37, 99] {
            let task = |(): &mut (), index: usize| {
                std::thread::sleep(Duration::from_micros(100));
                assert!(index != bad, "task {bad} fails");
            };
            let panic =
                std::panic::catch_unwind(|| Pool::of(threads).run(100, || (), task, &Never)).unwrap_err();
            assert_eq!(panic.downcast_ref::<String>().unwrap(), &format!("task {bad} fails"));
            assert_eq!(threads_used(Pool::of(threads)).len(), threads);
        }
    }
}

#[test]
fn a_panic_of_one_thread_stops_the_others() {
    let start = Instant::now();
    let task = |(): &mut (), index: usize| {
        assert!(index != 0, "the first task fails");
        std::thread::sleep(Duration::from_millis(1));
    };
    std::panic::catch_unwind(|| Pool::of(3).run(20_000, || (), task, &Never)).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3), "the other tasks would take ten seconds");
}

#[test]
fn one_value_per_process_is_shared_by_its_threads() {
    static CELL: ForkLocal<Mutex<Vec<u32>>> = ForkLocal::new();
    let addresses: Vec<usize> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| std::ptr::from_ref(CELL.get_or_init(Mutex::default)) as usize))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(addresses.iter().all(|&address| address == addresses[0]));
}

#[test]
fn a_value_is_dropped_with_its_cell() {
    let value = Arc::new(());
    let cell = ForkLocal::new();
    assert_eq!(Arc::strong_count(cell.get_or_init(|| Arc::clone(&value))), 2);
    drop(cell);
    assert_eq!(Arc::strong_count(&value), 1);
}

#[cfg(unix)]
mod fork {
    use super::*;

    /// Run `action` in a forked child that dies after ten seconds; whether it came back with `true`.
    fn in_a_child(action: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child only touches what the C library makes safe after a fork (memory, threads), and leaves by `_exit`.
        unsafe {
            match libc::fork() {
                0 => {
                    libc::alarm(10);
                    let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action)).unwrap_or(false);
                    libc::_exit(if ok { 0 } else { 1 });
                }
                child => {
                    assert!(child > 0, "fork failed");
                    let mut status = 0;
                    assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
                }
            }
        }
    }

    fn sum(threads: usize) -> usize {
        let total = AtomicUsize::new(0);
        let task = |(): &mut (), index: usize| {
            std::thread::sleep(Duration::from_micros(20));
            total.fetch_add(index, Ordering::Relaxed);
        };
        Pool::of(threads).run(200, || (), task, &Never).unwrap();
        total.into_inner()
    }

    #[test]
    fn a_child_works_with_threads_of_its_own() {
        let pool = Pool::of(3);
        assert_eq!(sum(3), 19_900);
        assert!(in_a_child(|| sum(3) == 19_900 && threads_used(pool).len() == 3));
        assert_eq!(sum(3), 19_900, "the parent's threads are still there");
    }

    #[test]
    fn a_child_of_a_process_in_the_middle_of_work_is_not_stuck() {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    sum(4);
                }
            });
            let children: Vec<bool> = (0..10)
                .map(|_| {
                    std::thread::sleep(Duration::from_millis(2));
                    in_a_child(|| sum(4) == 19_900)
                })
                .collect();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(children, [true; 10]);
        });
    }

    #[test]
    fn a_child_gets_a_value_of_its_own_even_while_the_parents_is_locked() {
        static CELL: ForkLocal<Mutex<u32>> = ForkLocal::new();
        let _held = CELL.get_or_init(|| Mutex::new(1)).lock().unwrap();
        assert!(in_a_child(|| *CELL.get_or_init(|| Mutex::new(2)).lock().unwrap() == 2));
    }
}

/// Twelve heads in 48 tasks each, one head sixty times as dear as another, and a dense row in the first task of each.
#[test]
fn heads_of_very_different_cost_keep_every_thread_busy() {
    let cost = |task: usize| {
        let of_head = [60, 1, 4, 30, 2, 9, 50, 1, 1, 16, 7, 25][task / 48];
        100 * of_head + if task.is_multiple_of(48) { 2000 } else { 0 }
    };
    for order in [|task| task, |task: usize| 575 - task] {
        let costs: Vec<usize> = (0..576).map(|task| cost(order(task))).collect();
        let (total, longest) = (costs.iter().sum::<usize>(), costs.iter().max().copied().unwrap());
        assert_eq!(simulate(&costs, 1), total);
        for threads in [2, 8, 64] {
            let ideal = (total / threads).max(longest);
            let taken = simulate(&costs, threads);
            assert!(taken * 100 <= ideal * 125, "{threads} threads: {taken}, ideal {ideal}");
        }
    }
}
