//! Errors of the API: a code that programs read, a message that people read.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use kage_machine::{HostName, MachineError, UserName};
use serde::{Deserialize, Serialize};

/// What kind of failure it is; decides the HTTP status and the exit code of `kage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// What was asked for makes no sense.
    BadRequest,
    /// It does not exist.
    NotFound,
    /// It is busy with something else.
    Busy,
    /// This or that host is no longer the owner.
    OwnershipLost,
    /// It took too long.
    TimedOut,
    /// Not in this version, or not on this machine.
    Unsupported,
    /// A host, or the directory, does not answer.
    Unreachable,
    /// Somebody cancelled it.
    Cancelled,
    /// It was tried and failed.
    Failed,
}

impl Code {
    /// The HTTP status it is sent with.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Busy | Self::Cancelled => StatusCode::CONFLICT,
            Self::OwnershipLost => StatusCode::PRECONDITION_FAILED,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Self::Unreachable => StatusCode::BAD_GATEWAY,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The exit code of `kage`.
    #[must_use]
    pub const fn exit(self) -> u8 {
        match self {
            Self::BadRequest => 2,
            Self::NotFound => 3,
            Self::OwnershipLost => 4,
            Self::TimedOut => 5,
            Self::Busy | Self::Unsupported | Self::Unreachable | Self::Cancelled | Self::Failed => 1,
        }
    }
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    /// For programs.
    pub code: Code,
    /// What failed, on what, and what to do.
    pub message: String,
}

impl ErrorBody {
    /// An error.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A request that makes no sense.
    pub fn bad_request(message: impl std::fmt::Display) -> Self {
        Self::new(Code::BadRequest, message.to_string())
    }

    /// No such user.
    #[must_use]
    pub fn no_user(user: &UserName) -> Self {
        Self::new(Code::NotFound, format!("user {user} has no image; `kage login {user}` makes one"))
    }

    /// No such host.
    #[must_use]
    pub fn no_host(host: &str) -> Self {
        Self::new(Code::NotFound, format!("host {host} is unknown; `kage hosts` lists those there are"))
    }

    /// A host that does not answer.
    pub fn host_down(host: &HostName, cause: impl std::fmt::Display) -> Self {
        let message =
            format!("host {host} does not answer ({cause}); see whether its daemon runs and the link is up");
        Self::new(Code::Unreachable, message)
    }

    /// Something failed.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::new(Code::Failed, message.to_string())
    }
}

impl From<kage_directory::DirectoryError> for ErrorBody {
    fn from(error: kage_directory::DirectoryError) -> Self {
        use kage_directory::DirectoryError as E;
        match &error {
            E::Conflict { .. } => Self::new(
                Code::OwnershipLost,
                format!("the image's record was {error}; look again with `kage show`"),
            ),
            E::Unreachable { .. } => Self::new(
                Code::Unreachable,
                format!("{error}; machines run on, but nothing can be started or moved until it is back"),
            ),
            E::Storage { .. } | E::Forgotten { .. } | E::Refused { .. } | E::Unreadable { .. } => {
                Self::failed(error)
            }
        }
    }
}

impl From<MachineError> for ErrorBody {
    fn from(error: MachineError) -> Self {
        Self::failed(error)
    }
}

impl IntoResponse for ErrorBody {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self)).into_response()
    }
}
