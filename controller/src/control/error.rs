//! What an operator is told when a call cannot be done: a status and `{"error": "…"}`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::raft::Unavailable;
use crate::state::command::Refusal;

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's mistake, in words that name the field.
    #[error("{0}")]
    Invalid(String),
    #[error("only root, the controller's user and members of the admin group may use this socket")]
    Forbidden,
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    /// There is no quorum now; it may be asked again.
    #[error("the cluster cannot decide now: {0}")]
    Unavailable(String),
    #[error("{0}")]
    Internal(String),
}

impl Error {
    fn status(&self) -> StatusCode {
        match self {
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.status(), Json(json!({ "error": self.to_string() }))).into_response()
    }
}

impl From<Unavailable> for Error {
    fn from(unavailable: Unavailable) -> Self {
        Self::Unavailable(unavailable.reason)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::UnknownKey(_)
            | Refusal::UnknownProject(_)
            | Refusal::UnknownModel(_)
            | Refusal::UnknownDeployment(_)
            | Refusal::UnknownTenant(_)
            | Refusal::UnknownAlias(_)
            | Refusal::UnknownRemedy(_)
            | Refusal::UnknownTurn(_) => Self::NotFound(text),
            Refusal::KeyExists(_)
            | Refusal::KeyRevoked(_)
            | Refusal::TurnExists(_)
            | Refusal::Repeats(_)
            | Refusal::OtherRequest(_)
            | Refusal::OtherTenant { .. }
            | Refusal::IsDeployment(_)
            | Refusal::IsAlias(_)
            | Refusal::HasAlias { .. }
            | Refusal::OutdatedPlan
            | Refusal::NotHeld(_)
            | Refusal::Quarantined(_)
            | Refusal::BudgetSpent
            | Refusal::HeldOtherwise(_)
            | Refusal::TooOften(_)
            | Refusal::Full { .. } => Self::Conflict(text),
        }
    }
}
