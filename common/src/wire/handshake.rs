//! The first words on every connection, and the first frame on every stream.

use serde::{Deserialize, Serialize};

use super::Wire;
use crate::id::ClusterId;

/// What the dialling side says on the first bidirectional stream of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub schema_min: u16,
    pub schema_max: u16,
    pub cluster: ClusterId,
    pub version: String,
}
impl Wire for Hello {
    const TYPE: u16 = 1;
    const LIMIT: usize = 1 << 10;
}

/// The accepting side's answer: only then is the dialling side connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// The schema that both speak.
    Accepted {
        schema: u16,
        version: String,
    },
    Refused {
        reason: String,
    },
}
impl Wire for Welcome {
    const TYPE: u16 = 2;
    const LIMIT: usize = 1 << 10;
}

/// What a stream is for; the role of the peer decides whether it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// Agent to controller, bidirectional: reports up, assignments down (`wire::agent`).
    Session,
    /// Controller to agent, bidirectional: one job (`wire::agent`).
    Job,
    /// Anyone to a controller, bidirectional: one file by hash (`wire::peer`).
    Blob,
    /// Controller to controller, unidirectional: Raft's urgent messages (heartbeats, votes).
    RaftUrgent,
    /// Controller to controller, unidirectional: Raft's other messages.
    RaftBulk,
    /// Controller to controller, unidirectional: proposals passed to the leader.
    Propose,
    /// Controller to agent, bidirectional: what a job gave that another controller began (`wire::agent`).
    Resume,
    /// Controller to controller, bidirectional: what happened to a request there (`wire::peer`).
    Explain,
    /// Controller to agent, bidirectional: the request of a turn that another controller began (`wire::agent`).
    Recall,
    /// Controller to controller, bidirectional: a member without memory asks for the group's (`wire::peer`).
    Rejoin,
    /// Controller to controller, bidirectional: which version runs there, and what its clock says (`wire::peer`).
    About,
}
impl Wire for Open {
    const TYPE: u16 = 3;
    const LIMIT: usize = 16;
}
