//! Planned work on a controller: its clients move on, another one leads, and it can be stopped without anybody noticing.
//!
//! The drain is this process's alone and forgotten when it ends: a controller that is started again serves.

use axum::Json;
use axum::extract::State as Extract;

use super::view::Drain;
use super::{Control, Shared};
use crate::raft::HAND_OVER;

impl Control {
    fn drain_view(&self) -> Drain {
        let raft = &self.parts.raft;
        Drain {
            node: raft.origin().node.clone(),
            draining: *self.parts.gateway.draining().borrow(),
            leader: raft.leadership().borrow().leader.clone(),
            running: self.parts.gateway.running().len(),
        }
    }
}

/// Begins to drain; answers when another controller leads, or none would.
pub async fn drain(Extract(control): Shared) -> Json<Drain> {
    control.parts.gateway.drain(true);
    control.parts.raft.hand_over(HAND_OVER).await;
    Json(control.drain_view())
}

pub async fn undrain(Extract(control): Shared) -> Json<Drain> {
    control.parts.gateway.drain(false);
    Json(control.drain_view())
}
