//! Following what a daemon does to its end.

use http::Method;
use kage_host::{
    api::types::{Operation, OperationState},
    http::Call,
};
use serde::de::DeserializeOwned;

use crate::{
    client::{Client, Failure},
    output::Output,
};

/// How long one look at an operation waits for a change.
const LOOK: &str = "wait=1s";

/// Follows an operation to its report; ^C cancels it. `progress` says in words what is new of how far it is.
///
/// # Errors
/// The operation's own, or the daemon's.
pub async fn follow<T: DeserializeOwned>(
    client: &Client,
    operation: Operation,
    output: Output,
    progress: impl FnMut(&serde_json::Value) -> Option<String>,
) -> Result<T, Failure> {
    let operation = ended(client, operation, output, true, progress).await?;
    match (operation.result, operation.error) {
        (Some(report), _) => serde_json::from_value(report).map_err(Failure::new),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(Failure::new(format!("operation {} ended without a report", operation.id))),
    }
}

/// Follows an operation to its end; where it may be cancelled ^C does so.
///
/// # Errors
/// The daemon's.
pub async fn ended(
    client: &Client,
    mut operation: Operation,
    output: Output,
    mut may_cancel: bool,
    mut progress: impl FnMut(&serde_json::Value) -> Option<String>,
) -> Result<Operation, Failure> {
    let path = format!("/v1/operations/{}", operation.id);
    while operation.state == OperationState::Running {
        if let Some(text) = progress(&operation.progress) {
            output.progress(text);
        }
        let call = Call::new(Method::GET, format!("{path}?{LOOK}"));
        tokio::select! {
            found = client.call(&call) => operation = found?,
            _ = tokio::signal::ctrl_c(), if may_cancel => {
                may_cancel = false;
                output.progress("cancelling");
                let _: Operation = client.call(&Call::new(Method::DELETE, path.clone())).await?;
            }
        }
    }
    Ok(operation)
}

/// A time in seconds, or in minutes where those are many.
#[must_use]
pub fn seconds(ms: u64) -> String {
    let s = ms.div_ceil(1000);
    if s < 120 { format!("{s} s") } else { format!("{} min", s.div_ceil(60)) }
}
