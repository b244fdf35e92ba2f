//! How the threads let go of the library while GPUs are mended, and what whoever mends them tells of it.
//!
//! A reset is refused while any process has the GPU open, and whoever has the library open has all of them. So there are
//! doors: a thread opens the library only inside, and closed doors wait until nobody is. What is asked here is answered
//! by the judge; nothing here decides.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use izar_common::health::gpu::{Ended, Order};
use izar_common::id::GpuId;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::Gpus;
use super::judge::{CLOSED, Mended, OPENING};

/// How long the threads may take to let go: a call that takes longer hangs.
const LET_GO: Duration = Duration::from_secs(20);

/// How long they may take until they have read every GPU anew.
const TAKE_UP: Duration = Duration::from_secs(30);

/// How long a GPU may take to show nothing wrong any more, and how often it is looked.
const CLEAN: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);

/// Who has the library open, and whether anybody may.
#[derive(Debug, Default)]
pub(super) struct Doors {
    closed: AtomicBool,
    inside: watch::Sender<usize>,
}

/// Somebody who may have the library open.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a watch::Sender<usize>);

impl Doors {
    /// Lets a thread in, unless the doors are closed. It must have let go of the library when it drops this.
    pub fn enter(&self) -> Option<Inside<'_>> {
        // Counted before it is asked, so that who closes the doors never misses one that has just passed.
        self.inside.send_modify(|inside| *inside += 1);
        let inside = Inside(&self.inside);
        (!self.are_closed()).then_some(inside)
    }

    pub fn are_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|inside| *inside -= 1);
    }
}

impl Gpus {
    /// Makes the threads let go of the library. Fails if one does not; [`Gpus::take_up`] must follow in any case.
    pub async fn let_go(&self) -> Result<(), String> {
        let doors = &self.inner.doors;
        doors.closed.store(true, Ordering::SeqCst);
        self.inner.judge(|judge, _, _| {
            judge.close(true);
            Vec::new()
        });
        let mut inside = doors.inside.subscribe();
        let empty = inside.wait_for(|inside| *inside == 0);
        match timeout(LET_GO, empty).await {
            Ok(_) => Ok(()),
            Err(_) => Err(format!("a call of the GPU library has hung for {} s", LET_GO.as_secs())),
        }
    }

    /// Lets the threads open the library again, and waits until every GPU was read.
    pub async fn take_up(&self) -> Result<(), String> {
        self.inner.judge(|judge, _, _| {
            judge.close(false);
            Vec::new()
        });
        self.inner.doors.closed.store(false, Ordering::SeqCst);
        self.read().await
    }

    /// Waits until every GPU was read.
    pub async fn read(&self) -> Result<(), String> {
        let mut health = self.changes();
        let read = health.wait_for(|health| ![OPENING, CLOSED].contains(&health.fault.as_str()));
        match timeout(TAKE_UP, read).await {
            Ok(_) => Ok(()),
            Err(_) => Err("the GPUs could not be read".to_owned()),
        }
    }

    /// Waits until readings have shown nothing wrong with a GPU a few times in a row.
    pub async fn clean(&self, gpu: &GpuId) -> Result<(), String> {
        let until = Instant::now() + CLEAN;
        while !self.inner.lock().is_clean(gpu) {
            if Instant::now() >= until {
                return Err("its readings are not in order".to_owned());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Notes that an order is being carried out.
    pub fn mend(&self, order: &Order) {
        self.inner.judge(|judge, now, wall| judge.mend(order, now, wall));
    }

    /// Notes what came of mending a GPU.
    pub fn mended(&self, gpu: &GpuId, how: Mended) {
        self.inner.judge(|judge, now, wall| judge.mended(gpu, how, now, wall));
    }

    /// Reports how an order has ended; `None`: there is none any more.
    pub fn tell(&self, ended: Option<Ended>) {
        self.inner.judge(|judge, _, _| {
            judge.tell(ended);
            Vec::new()
        });
    }

    /// GPUs that are back and were not asked yet for an answer that is known; each is named once.
    pub fn unproven(&self) -> Vec<(GpuId, Option<u16>)> {
        self.inner.lock().unproven()
    }

    /// Notes that a GPU gave a wrong answer, or none.
    pub fn disproven(&self, gpu: &GpuId, why: &str) {
        self.inner.judge(|judge, now, wall| judge.disproven(gpu, why, now, wall));
    }
}
