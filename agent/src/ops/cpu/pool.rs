//! The threads that kernels share: one pool a process, fork and join in about a microsecond.
//!
//! A step of a small model is hundreds of short operations. Waking sleeping threads for each would cost more than the
//! work, so threads that ran out of tasks spin for a moment before they sleep: during a step they find the next
//! operation while spinning, and an idle process uses nothing. Which thread runs a task never changes a result: tasks
//! write what no other task writes.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Rounds of spinning before a thread sleeps, about 50 µs: longer than the pauses between the operations of a step,
/// shorter than anybody would notice in the load of an idle machine.
const SPINS: u32 = 2_000;

/// Rounds of spinning before the caller, who waits for the last tasks, lets others run: if there are more threads
/// than free cores, the thread it waits for needs its core.
const WAITS: u32 = 200;

/// How many threads compute, and where.
#[derive(Debug, Clone, Default)]
pub struct Threads {
    /// The caller's counted; 0 takes one for each core.
    pub count: usize,
    /// The CPUs, as Linux numbers them, that the threads are bound to, one each; none: wherever they like.
    pub cpus: Vec<u32>,
}

impl Threads {
    /// So many threads, wherever they like.
    pub fn any(count: usize) -> Self {
        Self { count, cpus: Vec::new() }
    }
    /// Binds the calling thread, which is the pool's thread of this index, to its CPU.
    pub fn bind(&self, index: usize) {
        let Some(&cpu) = self.cpus.get(index) else { return };
        let mut only = CpuSet::new();
        let bound = only.set(cpu as usize).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
        // The answer is the same wherever it is computed.
        bound.unwrap_or_else(|error| log::warn!(cpu, error:%; "a thread cannot be bound to its CPU"));
    }
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// An operation. The pointer is valid while tasks of the operation are unfinished: see [`Pool::run`].
#[derive(Clone, Copy)]
struct Job {
    /// The operation's number: what it takes to get one of its tasks.
    epoch: u32,
    task: *const Task<'static>,
    tasks: u32,
}

/// Threads that run the tasks of one operation after the other.
pub struct Pool {
    shared: &'static Shared,
    /// The number of the last operation; held by the caller whose operation runs.
    turn: Mutex<u32>,
    threads: usize,
}

struct Shared {
    /// The number of the present operation (high half) and of its next task (low half): taking a task of an operation
    /// that is over fails, so that a thread which comes late does no harm and nobody has to wait for it.
    ticket: AtomicU64,
    /// Tasks of the present operation that are over.
    done: AtomicU32,
    job: Mutex<Option<Job>>,
    panicked: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: the pointer in `Job` goes to a closure that is `Sync`, and is used only while its owner waits in `run`.
unsafe impl Send for Job {}

thread_local! {
    /// This thread runs a task: operations inside it run on this thread alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static POOL: OnceLock<Pool> = OnceLock::new();

/// Starts the process's pool. The caller's own thread is not bound: it may be another one than computes.
///
/// The first call decides; later ones change nothing.
pub fn start(threads: &Threads) {
    POOL.get_or_init(|| Pool::new(threads));
}

/// Runs `task(0)` to `task(tasks - 1)`, on all threads, and returns when all are done.
pub fn run(tasks: usize, task: &Task<'_>) {
    POOL.get_or_init(|| Pool::new(&Threads::default())).run(tasks, task);
}

/// Threads of the process's pool.
pub fn threads() -> usize {
    POOL.get_or_init(|| Pool::new(&Threads::default())).threads
}

/// Cuts `items` into at most four runs of indices per thread, each of at least `least`, and runs `task(from, to)`.
///
/// A few more runs than threads, so that a thread which starts late leaves its share to the others.
pub fn split(items: usize, least: usize, task: impl Fn(usize, usize) + Sync) {
    let runs = (threads() * 4).min(items / least.max(1)).max(1);
    run(runs, &|i| task(i * items / runs, (i + 1) * items / runs));
}

/// Runs `one` on every item, shared among threads.
pub fn each<T: Send>(items: &mut [T], one: impl Fn(usize, &mut T) + Sync) {
    let parts = Parts::new(items);
    run(parts.count, &|i| {
        // SAFETY: each item is in one task.
        one(i, &mut unsafe { parts.part(i, 1) }[0]);
    });
}

impl Pool {
    fn new(places: &Threads) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if places.count == 0 { cores() } else { places.count };
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            ticket: AtomicU64::new(0),
            done: AtomicU32::new(0),
            job: Mutex::new(None),
            panicked: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        }));
        for index in 1..threads {
            let places = places.clone();
            let work = move || {
                places.bind(index);
                INSIDE.set(true);
                shared.help()
            };
            std::thread::Builder::new().name(format!("kernel-{index}")).spawn(work).expect("a thread can be started");
        }
        Self { shared, turn: Mutex::new(0), threads }
    }

    fn run(&self, tasks: usize, task: &Task<'_>) {
        // A task that starts an operation of its own, and a second caller, compute alone: both are rare.
        let alone = tasks <= 1 || self.threads <= 1 || INSIDE.get();
        let turn = if alone { None } else { self.turn.try_lock().ok() };
        let Some(mut epoch) = turn else { return (0..tasks).for_each(task) };
        *epoch = epoch.wrapping_add(1);
        let shared = self.shared;
        // SAFETY: only the lifetime is changed. The closure is called only for a task that was taken from the present
        // operation's ticket, and this function does not return, not even by a panic, before all of them are over.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { epoch: *epoch, task, tasks: u32::try_from(tasks).expect("tasks are counted in 32 bits") };
        *lock(&shared.job) = Some(job);
        shared.done.store(0, Ordering::Relaxed);
        shared.ticket.store(u64::from(job.epoch) << 32, Ordering::SeqCst);
        if *lock(&shared.sleepers) > 0 {
            shared.wake.notify_all();
        }
        INSIDE.set(true);
        shared.work_on(job);
        INSIDE.set(false);
        let mut waits = 0_u32;
        while shared.done.load(Ordering::Acquire) < job.tasks {
            waits += 1;
            if waits > WAITS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(epoch);
        assert!(!panicked, "a kernel panicked");
    }
}

impl Shared {
    /// Runs tasks of an operation that nobody has taken yet, until none is left.
    fn work_on(&self, job: Job) {
        let first = u64::from(job.epoch) << 32;
        let mut ticket = self.ticket.load(Ordering::Acquire);
        while (first..first + u64::from(job.tasks)).contains(&ticket) {
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: the task is taken and not over, so the owner of the closure waits: see `Pool::run`.
                    let task = || unsafe { (*job.task)((ticket - first) as usize) };
                    if catch_unwind(AssertUnwindSafe(task)).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.done.fetch_add(1, Ordering::Release);
                    ticket = self.ticket.load(Ordering::Acquire);
                }
                Err(now) => ticket = now,
            }
        }
    }

    /// A thread's life: wait for an operation, help with it.
    fn help(&self) -> ! {
        let mut seen = 0;
        loop {
            self.wait(seen);
            let job = lock(&self.job).expect("a ticket is set after its job");
            seen = job.epoch;
            self.work_on(job);
        }
    }

    /// Waits for an operation other than number `seen`.
    fn wait(&self, seen: u32) {
        let other = |order| (self.ticket.load(order) >> 32) as u32 != seen;
        for _ in 0..SPINS {
            if other(Ordering::Acquire) {
                return;
            }
            std::hint::spin_loop();
        }
        // The ticket is looked at under the lock that whoever changed it takes afterwards: no wake-up is lost.
        let mut sleepers = lock(&self.sleepers);
        *sleepers += 1;
        while !other(Ordering::SeqCst) {
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
    }
}

/// Nothing under these locks can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice whose parts are written by different tasks.
#[derive(Clone, Copy)]
pub struct Parts<'a, T> {
    first: *mut T,
    count: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: a `Parts` gives access only through `part`, whose callers promise that parts do not overlap.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { first: slice.as_mut_ptr(), count: slice.len(), life: std::marker::PhantomData }
    }
    /// Returns a part of the slice.
    ///
    /// # Safety
    /// While the part lives, no other part that overlaps it does.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, from: usize, count: usize) -> &'a mut [T] {
        assert!(from + count <= self.count, "a part lies in its slice");
        // SAFETY: inside the slice, which is borrowed for 'a; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(from), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(&Threads::any(threads));
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicU64> = (0..tasks).map(|_| AtomicU64::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn sleeping_threads_are_woken() {
        let pool = Pool::new(&Threads::any(3));
        for _ in 0..3 {
            let slept = || *pool.shared.sleepers.lock().unwrap() == 2;
            while !slept() {
                std::thread::yield_now();
            }
            let done = AtomicU64::new(0);
            pool.run(64, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn an_operation_inside_a_task_runs_on_its_thread() {
        let pool = Pool::new(&Threads::any(2));
        let sum = AtomicU64::new(0);
        pool.run(4, &|i| {
            pool.run(10, &|j| {
                sum.fetch_add((i * 10 + j) as u64, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.load(Ordering::Relaxed), (0..40).sum::<u64>());
    }

    #[test]
    fn callers_side_by_side_all_finish() {
        let pool = Pool::new(&Threads::any(2));
        let sum = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..200).for_each(|_| {
                        pool.run(8, &|i| {
                            sum.fetch_add(i as u64, Ordering::Relaxed);
                        })
                    })
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4 * 200 * 28);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(&Threads::any(2));
        for bad in [0, 31] {
            let broken = catch_unwind(AssertUnwindSafe(|| {
                pool.run(32, &|i| {
                    assert!(i != bad, "broken");
                    std::thread::sleep(std::time::Duration::from_micros(50));
                });
            }));
            assert!(broken.is_err());
            let done = AtomicU64::new(0);
            pool.run(32, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 32);
        }
    }

    #[test]
    fn runs_cover_all_items_once() {
        for (items, least) in [(0, 1), (1, 1), (5, 2), (1000, 3), (1000, 5000)] {
            let counts: Vec<AtomicU64> = (0..items).map(|_| AtomicU64::new(0)).collect();
            split(items, least, |from, to| {
                (from..to).for_each(|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                })
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }
}
