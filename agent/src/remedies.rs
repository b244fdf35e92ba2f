//! What this agent is ordered to do to its GPUs: carried out once, and told until nobody asks any more.
//!
//! The leader orders, every controller passes it on with the assignment, and here it is begun only when nothing serves on
//! this server any longer. Before anything is done the order's number is on disk (`journal`): whatever is begun is never
//! begun again, by this process or the next. Then the workers end, the threads that read GPUs let go of them, root's hand
//! is asked (`helper`), and each GPU is read anew and asked for an answer that is known (`probe`). A process that ends in
//! between leaves an order of which the next one says that it does not know. It never decides that something is to be
//! done.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;
use izar_common::clock::wall_ms;
use izar_common::health::gpu::{Action, Ended, Mode, Order, Outcome, State};
use izar_common::id::GpuId;
use izar_common::wire::agent::{Assignment, Device};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::gpu::judge::Mended;
use crate::gpu::{Gpus, HELPER};
use crate::probe::{self, Answer};
use crate::worker::Workers;
use journal::{Entry, Journal};

mod helper;
mod journal;

/// How long root's hand may take over everything that is asked of it. Its programs end 90 s later at most, and the leader
/// counts on it.
const ACT: Duration = Duration::from_secs(180);

/// How long workers may take to end: each is killed after two seconds.
const PAUSE: Duration = Duration::from_secs(30);

/// How long the server may take to go down for its restart.
const GO_DOWN: Duration = Duration::from_secs(300);

/// What carries out orders.
pub struct Remedies {
    gpus: Gpus,
    workers: Workers,
    /// Who asks for answers that are known.
    prober: PathBuf,
    helper: PathBuf,
    journal: Journal,
}

/// What is to be done about an order.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    CarryOut,
    /// Another start of the server has done what there was to do.
    LookAfterRestart,
    /// The process that began it ended, perhaps in the middle: root's hand may still be at it.
    WaitForHand,
    Say(Outcome, String),
}

/// Decides about an order from what was begun last. Pure.
fn next(order: &Order, last: Option<&Entry>, mode: Mode, boot: &str, now_ms: u64) -> Next {
    let say = |outcome, reason: &str| Next::Say(outcome, reason.to_owned());
    match last {
        Some(last) if last.id == order.id => match &last.ended {
            Some((outcome, reason)) => say(*outcome, reason),
            None if last.boot != boot => Next::LookAfterRestart,
            None => Next::WaitForHand,
        },
        Some(last) if last.id > order.id => say(Outcome::Unknown, "a later one was begun"),
        _ if mode != Mode::Act => say(Outcome::Failed, "the agent may not act (gpu.mode)"),
        _ if now_ms >= order.begin_by_ms => say(Outcome::Failed, "it could not be begun in time"),
        _ => Next::CarryOut,
    }
}

impl Remedies {
    /// `prober`: the program that `probe` starts; `data_dir` keeps which order was begun; `helper`: the socket of root's
    /// hand, if it is not where systemd listens.
    pub fn new(gpus: Gpus, workers: Workers, prober: PathBuf, helper: Option<PathBuf>, data_dir: &Path) -> Self {
        let helper = helper.unwrap_or_else(|| HELPER.into());
        Self { gpus, workers, prober, helper, journal: Journal::at(data_dir) }
    }

    /// Does what is ordered, one order after the other. Dropped in between, it leaves an order of which nobody knows.
    pub async fn run(self) {
        let mut assignments = self.workers.assignments();
        loop {
            let order = current(&assignments);
            match &order {
                Some(order) => {
                    let ended = self.obey(order, &mut assignments).await;
                    if let Some(ended) = &ended {
                        log::info!(order = ended.id, outcome:% = ended.outcome, reason = ended.reason; "an order has ended");
                    }
                    self.gpus.tell(ended);
                }
                None => self.gpus.tell(None),
            }
            if assignments.wait_for(|assignment| order_of(assignment) != order.as_ref()).await.is_err() {
                return;
            }
        }
    }

    /// Carries out an order, or says what came of it earlier; `None`: it is not ordered any more.
    async fn obey(&self, order: &Order, assignments: &mut watch::Receiver<Option<Assignment>>) -> Option<Ended> {
        let health = self.gpus.health();
        let last = match self.journal.last() {
            Ok(last) => last,
            // What was begun cannot be known, so nothing is begun.
            Err(error) => return Some(ended(order, Outcome::Failed, format!("{error:#}"))),
        };
        match next(order, last.as_ref(), health.mode, &health.boot, wall_ms()) {
            Next::Say(outcome, reason) => Some(ended(order, outcome, reason)),
            Next::LookAfterRestart => Some(self.close(order, self.after_restart(order).await)),
            Next::WaitForHand => Some(self.wait_for_hand(order).await),
            Next::CarryOut => {
                // Before a server is emptied for nothing.
                if let Err(why) = self.may_act(order.action).await {
                    self.gpus.mend(order);
                    return Some(ended(order, Outcome::Failed, self.not_mended(order, why)));
                }
                let withdrawn = assignments.wait_for(|assignment| order_of(assignment) != Some(order));
                let within = Duration::from_millis(order.begin_by_ms.saturating_sub(wall_ms()));
                tokio::select! {
                    emptied = timeout(within, self.empty()) => if emptied.is_err() {
                        return Some(ended(order, Outcome::Failed, "workers that serve have no other place".into()));
                    },
                    _ = withdrawn => return None,
                }
                Some(self.carry_out(order).await)
            }
        }
    }

    /// Says that nobody knows how an order ended, when it has: until then the budget has no room, and no worker opens a GPU.
    async fn wait_for_hand(&self, order: &Order) -> Ended {
        let why = "the agent's process that began it ended".to_owned();
        if helper::is_there(&self.helper).is_ok() {
            // A worker that does not end opens nothing anew.
            let _ = self.workers.pause(PAUSE).await;
            if let Err(reason) = helper::ask(&self.helper, "idle").await {
                log::warn!(order = order.id, reason; "it is not known whether an order still runs");
            }
            self.workers.resume();
        }
        ended(order, Outcome::Unknown, why)
    }

    /// Fails if root's hand is not there, or would refuse.
    async fn may_act(&self, action: Action) -> Result<(), String> {
        helper::is_there(&self.helper)?;
        match action {
            Action::Reset => Ok(()),
            Action::Restart => helper::ask(&self.helper, "may-reboot").await,
        }
    }

    /// Waits until no worker serves.
    async fn empty(&self) {
        let mut changes = self.workers.changes();
        while self.workers.serve() {
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn carry_out(&self, order: &Order) -> Ended {
        let lifted = |gpu: &&GpuId| self.state(gpu).is_some_and(|state| state != State::Cordoned);
        if let Some(gpu) = order.gpus.iter().find(lifted) {
            return ended(order, Outcome::Failed, format!("GPU {gpu} is not cordoned any more"));
        }
        let ended = match (self.workers.pause(PAUSE).await, order.action) {
            (Err(left), Action::Reset) => {
                let left: Vec<&str> = left.iter().map(|worker| worker.as_str()).collect();
                let left = left.join(", ");
                let why = format!("{left} cannot be ended (its process waits in the driver?): restart the server");
                ended(order, Outcome::Failed, why)
            }
            // What does not end goes down with the server.
            _ => self.act(order).await,
        };
        self.workers.resume();
        ended
    }

    /// Notes that it begins, does it, and notes how it ended.
    async fn act(&self, order: &Order) -> Ended {
        if wall_ms() >= order.begin_by_ms {
            return ended(order, Outcome::Failed, "workers have not ended in time".into());
        }
        if let Err(error) = self.journal.begin(order.id, &self.gpus.health().boot) {
            return ended(order, Outcome::Failed, format!("{error:#}"));
        }
        log::warn!(order = order.id, action:% = order.action, gpus = order.gpus.len(); "GPUs are being mended");
        self.gpus.mend(order);
        let came = match order.action {
            Action::Reset => self.reset(order).await,
            Action::Restart => self.restart(order).await,
        };
        self.close(order, came)
    }

    fn close(&self, order: &Order, (outcome, reason): (Outcome, String)) -> Ended {
        if let Err(error) = self.journal.end(order.id, &self.gpus.health().boot, outcome, &reason) {
            log::error!(order = order.id, reason = format!("{error:#}"); "how an order ended cannot be noted");
        }
        ended(order, outcome, reason)
    }

    /// Resets GPUs, and looks at each when the threads have taken them up again.
    async fn reset(&self, order: &Order) -> (Outcome, String) {
        let asked = self.ask_for_reset(&order.gpus).await;
        let read = self.gpus.take_up().await;
        let looked = order.gpus.iter().zip(asked).map(|(gpu, asked)| {
            let read = read.clone();
            async move {
                let how = match asked.and(read) {
                    Ok(()) => self.look(gpu).await,
                    Err(why) => Mended::No(why),
                };
                self.gpus.mended(gpu, how.clone());
                how
            }
        });
        sum_up(order, join_all(looked).await)
    }

    /// Asks root's hand to free each GPU and to reset it; says of each how that went.
    async fn ask_for_reset(&self, gpus: &[GpuId]) -> Vec<Result<(), String>> {
        let mut asked = vec![Err(format!("it took longer than {} s", ACT.as_secs())); gpus.len()];
        let asking = async {
            if let Err(why) = self.gpus.let_go().await {
                asked.fill(Err(why));
                return;
            }
            for verb in ["release", "reset"] {
                let all = gpus.iter().zip(&mut asked);
                for (gpu, asked) in all.filter(|(_, asked)| verb == "release" || asked.is_ok()) {
                    *asked = helper::ask(&self.helper, &format!("{verb} {}", helper::uuid(gpu))).await;
                }
            }
        };
        if timeout(ACT, asking).await.is_err() {
            // Of those that were freed and not reached it is not known that they were reset.
            return vec![Err(format!("it took longer than {} s", ACT.as_secs())); gpus.len()];
        }
        asked
    }

    /// Looks whether a GPU is well: first its readings, then what it computes.
    async fn look(&self, gpu: &GpuId) -> Mended {
        if let Err(why) = self.gpus.clean(gpu).await {
            return Mended::No(why);
        }
        let health = self.gpus.health();
        let Some(cuda) = health.gpus.iter().find(|view| view.id == *gpu).and_then(|view| view.cuda) else {
            return Mended::Yes;
        };
        match probe::ask(&self.prober, Device::Cuda(cuda)).await {
            Answer::Right => Mended::Yes,
            Answer::Skipped(reason) => {
                log::info!(gpu:%, reason; "a GPU is not asked for an answer that is known");
                Mended::Yes
            }
            Answer::Wrong(why) => Mended::Wrong(why),
            Answer::Silent(why) => Mended::No(why),
        }
    }

    /// Asks for a restart of the server, and waits for the end of this process.
    async fn restart(&self, order: &Order) -> (Outcome, String) {
        let why = match timeout(ACT, helper::ask(&self.helper, "reboot")).await {
            Ok(Ok(())) => {
                tokio::time::sleep(GO_DOWN).await;
                format!("the server was to restart, and has not within {} s", GO_DOWN.as_secs())
            }
            Ok(Err(why)) => why,
            Err(_) => format!("it took longer than {} s", ACT.as_secs()),
        };
        (Outcome::Failed, self.not_mended(order, why))
    }

    fn not_mended(&self, order: &Order, why: String) -> String {
        order.gpus.iter().for_each(|gpu| self.gpus.mended(gpu, Mended::No(why.clone())));
        why
    }

    /// What a restart of the server has made of its GPUs: those that are there and nothing speaks against.
    async fn after_restart(&self, order: &Order) -> (Outcome, String) {
        if let Err(why) = self.gpus.read().await {
            return (Outcome::Failed, why);
        }
        let look = |gpu| async move {
            match self.state(gpu) {
                None => Mended::No("it is not there after the restart".into()),
                Some(state) if state.share() == 0 => Mended::No(format!("it is {state} after the restart")),
                Some(_) => self.look(gpu).await,
            }
        };
        let looked = join_all(order.gpus.iter().map(look)).await;
        for (gpu, how) in order.gpus.iter().zip(&looked) {
            match how {
                Mended::Wrong(_) => self.gpus.mended(gpu, how.clone()),
                // It works again since its readings were in order, and must not before it has answered.
                Mended::No(why) if self.state(gpu).is_some_and(|state| state.share() > 0) => {
                    self.gpus.disproven(gpu, why)
                }
                Mended::No(_) | Mended::Yes => {}
            }
        }
        sum_up(order, looked)
    }

    fn state(&self, gpu: &GpuId) -> Option<State> {
        self.gpus.health().gpus.iter().find(|view| view.id == *gpu).map(|view| view.state)
    }
}

fn order_of(assignment: &Option<Assignment>) -> Option<&Order> {
    assignment.as_ref()?.order.as_ref()
}

fn current(assignments: &watch::Receiver<Option<Assignment>>) -> Option<Order> {
    order_of(&assignments.borrow()).cloned()
}

fn ended(order: &Order, outcome: Outcome, reason: String) -> Ended {
    Ended { id: order.id, outcome, reason }
}

/// The worst of what came of an order's GPUs, and why. Pure.
fn sum_up(order: &Order, looked: Vec<Mended>) -> (Outcome, String) {
    let (mut outcome, mut reasons) = (Outcome::Done, Vec::new());
    for (gpu, how) in order.gpus.iter().zip(looked) {
        let why = match how {
            Mended::Yes => continue,
            Mended::No(why) => {
                outcome = if outcome == Outcome::Wrong { outcome } else { Outcome::Failed };
                why
            }
            Mended::Wrong(why) => {
                outcome = Outcome::Wrong;
                why
            }
        };
        reasons.push(format!("{gpu}: {why}"));
    }
    (outcome, reasons.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(id: u64) -> Order {
        let gpus = vec!["gpu-1".parse().unwrap(), "gpu-2".parse().unwrap()];
        Order { id, action: Action::Reset, gpus, begin_by_ms: 1_000 }
    }

    /// What is done about order 7, when `last` was begun in the start `boot` of the server and perhaps ended.
    fn check(last: Option<(u64, &str, Option<Outcome>)>, mode: Mode, now_ms: u64) -> String {
        let last = last.map(|(id, boot, outcome)| {
            let ended = outcome.map(|outcome| (outcome, "so it was".to_owned()));
            Entry { id, boot: boot.into(), ended }
        });
        match next(&order(7), last.as_ref(), mode, "b2", now_ms) {
            Next::CarryOut => "carry out".into(),
            Next::LookAfterRestart => "look".into(),
            Next::WaitForHand => "wait".into(),
            Next::Say(outcome, reason) => format!("{outcome}: {reason}"),
        }
    }

    #[test]
    fn what_was_begun_is_never_begun_again() {
        let act = |last| check(last, Mode::Act, 0);
        assert_eq!(act(None), "carry out");
        assert_eq!(act(Some((6, "b2", None))), "carry out");
        assert_eq!(act(Some((7, "b2", None))), "wait", "the process that began it ended");
        assert_eq!(act(Some((7, "b1", None))), "look", "whatever it was, a restart of the server resets as well");
        assert_eq!(act(Some((7, "b2", Some(Outcome::Done)))), "done: so it was");
        assert_eq!(act(Some((8, "b2", Some(Outcome::Done)))), "unknown: a later one was begun");
    }

    #[test]
    fn nothing_is_begun_where_it_may_not_be_or_too_late() {
        for mode in [Mode::Observe, Mode::Advise] {
            assert_eq!(check(None, mode, 0), "failed: the agent may not act (gpu.mode)");
        }
        assert_eq!(check(None, Mode::Act, 1_000), "failed: it could not be begun in time");
        // How it ended is said at any time.
        assert_eq!(check(Some((7, "b2", Some(Outcome::Failed))), Mode::Advise, 9_000), "failed: so it was");
    }

    #[test]
    fn an_order_comes_to_the_worst_of_its_gpus() {
        let no = || Mended::No("in use".into());
        let wrong = || Mended::Wrong("5 for 4".into());
        assert_eq!(sum_up(&order(1), vec![Mended::Yes, Mended::Yes]), (Outcome::Done, String::new()));
        assert_eq!(sum_up(&order(1), vec![Mended::Yes, no()]), (Outcome::Failed, "gpu-2: in use".into()));
        let both = "gpu-1: 5 for 4; gpu-2: in use";
        assert_eq!(sum_up(&order(1), vec![wrong(), no()]), (Outcome::Wrong, both.into()));
    }
}
