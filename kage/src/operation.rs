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
    mut operation: Operation,
    output: Output,
    mut progress: impl FnMut(&serde_json::Value) -> Option<String>,
) -> Result<T, Failure> {
    let path = format!("/v1/operations/{}", operation.id);
    let mut cancelled = false;
    while operation.state == OperationState::Running {
        if let Some(text) = progress(&operation.progress) {
            output.progress(text);
        }
        let call = Call::new(Method::GET, format!("{path}?{LOOK}"));
        tokio::select! {
            found = client.call(&call) => operation = found?,
            _ = tokio::signal::ctrl_c(), if !cancelled => {
                cancelled = true;
                output.progress("cancelling");
                let _: Operation = client.call(&Call::new(Method::DELETE, path.clone())).await?;
            }
        }
    }
    match (operation.result, operation.error) {
        (Some(report), _) => serde_json::from_value(report).map_err(Failure::new),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(Failure::new(format!("operation {} ended without a report", operation.id))),
    }
}
