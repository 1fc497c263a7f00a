//! Long operations: numbered, followed, cancelled.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kage_machine::{HostName, UserName};
use kage_migrate::drive::Control;
use serde_json::Value;
use tokio::sync::watch;

use crate::api::{
    error::{Code, ErrorBody},
    types::{Operation, OperationState},
};

/// How many ended operations are remembered.
const KEPT: usize = 256;

/// All operations of this host.
pub struct Operations {
    host: HostName,
    all: Mutex<Table>,
}

struct Table {
    last: u64,
    entries: BTreeMap<u64, Entry>,
}

struct Entry {
    to: HostName,
    state: watch::Sender<Operation>,
    control: Arc<Control>,
    stop: watch::Sender<bool>,
}

impl Entry {
    fn runs(&self) -> bool {
        self.state.borrow().state == OperationState::Running
    }
}

/// The side of whoever carries an operation out. Dropped without an end, it counts as failed.
pub struct Handle {
    state: watch::Sender<Operation>,
    control: Arc<Control>,
    stop: watch::Sender<bool>,
}

impl Handle {
    /// The operation's id.
    #[must_use]
    pub fn id(&self) -> String {
        self.state.borrow().id.clone()
    }

    /// Through which it is asked to stop.
    #[must_use]
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    /// Waits until it is asked to stop.
    pub async fn cancelled(&self) {
        // This holds a sender, so that it does not end otherwise.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// What comes of some work, unless it is asked to stop before.
    ///
    /// # Errors
    /// [`Code::Cancelled`].
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, ErrorBody> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(ErrorBody::new(Code::Cancelled, "cancelled before it began")),
            done = work => Ok(done),
        }
    }

    /// Says how far it is.
    pub fn progress(&self, progress: Value) {
        self.state.send_modify(|operation| operation.progress = progress);
    }

    /// Ends it, as asked before it was through, with what that came to.
    pub fn end_cancelled(&self, result: Value) {
        self.state.send_modify(|operation| {
            if operation.state == OperationState::Running {
                operation.state = OperationState::Cancelled;
                operation.result = Some(result);
            }
        });
    }

    /// Ends it.
    pub fn end(&self, outcome: Result<Value, ErrorBody>) {
        self.state.send_modify(|operation| match outcome {
            _ if operation.state != OperationState::Running => {}
            Ok(result) => {
                operation.state = OperationState::Done;
                operation.result = Some(result);
            }
            Err(error) => {
                let cancelled = error.code == Code::Cancelled;
                operation.state = if cancelled { OperationState::Cancelled } else { OperationState::Failed };
                operation.error = Some(error);
            }
        });
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.state.send_if_modified(|operation| {
            let abandoned = operation.state == OperationState::Running;
            if abandoned {
                operation.state = OperationState::Failed;
                operation.error = Some(ErrorBody::failed("the operation was abandoned; see the host's log"));
            }
            abandoned
        });
    }
}

impl Operations {
    /// No operations yet.
    #[must_use]
    pub fn new(host: HostName) -> Self {
        Self { host, all: Mutex::new(Table { last: 0, entries: BTreeMap::new() }) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one that leads to a host: where a move brings the machine, or where anything else is done.
    pub fn begin(&self, kind: &str, user: &UserName, to: &HostName) -> Handle {
        self.begin_in(&mut self.table(), kind, Some(user), to)
    }

    /// Begins one of this host's, unless one of its kind is under way: that one.
    ///
    /// # Errors
    /// The one under way.
    pub fn begin_only(&self, kind: &str) -> Result<Handle, Box<Operation>> {
        let mut table = self.table();
        let mut states = table.entries.values().map(|entry| entry.state.borrow());
        let is_same = |state: &Operation| {
            state.state == OperationState::Running && state.kind == kind && state.user.is_none()
        };
        if let Some(same) = states.find(|state| is_same(state)) {
            return Err(Box::new(same.clone()));
        }
        drop(states);
        Ok(self.begin_in(&mut table, kind, None, &self.host))
    }

    fn begin_in(&self, table: &mut Table, kind: &str, user: Option<&UserName>, to: &HostName) -> Handle {
        table.last += 1;
        let number = table.last;
        let operation = Operation {
            id: format!("{}:{number}", self.host),
            kind: kind.to_owned(),
            user: user.cloned(),
            state: OperationState::Running,
            progress: Value::Null,
            result: None,
            error: None,
        };
        let (state, control) = (watch::Sender::new(operation), Arc::<Control>::default());
        let stop = watch::Sender::new(false);
        let entry =
            Entry { to: to.clone(), state: state.clone(), control: control.clone(), stop: stop.clone() };
        table.entries.insert(number, entry);
        while table.entries.len() > KEPT {
            let Some(oldest) =
                table.entries.iter().find(|(_, entry)| !entry.runs()).map(|(number, _)| *number)
            else {
                break;
            };
            table.entries.remove(&oldest);
        }
        Handle { state, control, stop }
    }

    /// A user's moves that have not ended, with the host that each leads to; the oldest first.
    pub fn under_way(&self, user: &UserName) -> Vec<(String, HostName)> {
        let table = self.table();
        let mine = |entry: &&Entry| {
            let operation = entry.state.borrow();
            entry.runs() && operation.user.as_ref() == Some(user) && operation.kind == "migrate"
        };
        let entries = table.entries.values().filter(mine);
        entries.map(|entry| (entry.state.borrow().id.clone(), entry.to.clone())).collect()
    }

    fn subscribe(&self, id: &str) -> Result<watch::Receiver<Operation>, ErrorBody> {
        let unknown = || ErrorBody::new(Code::NotFound, format!("operation {id} is unknown or long over"));
        let number = Self::number(id).ok_or_else(unknown)?;
        self.table().entries.get(&number).map(|entry| entry.state.subscribe()).ok_or_else(unknown)
    }

    /// The host that an operation's id names.
    #[must_use]
    pub fn host_of(id: &str) -> Option<HostName> {
        id.rsplit_once(':')?.0.parse().ok()
    }

    fn number(id: &str) -> Option<u64> {
        id.rsplit_once(':')?.1.parse().ok()
    }

    /// An operation as it stands, or as it stands once it has changed or ended within `wait`.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub async fn get(&self, id: &str, wait: Duration) -> Result<Operation, ErrorBody> {
        let mut receiver = self.subscribe(id)?;
        let running = |operation: &Operation| operation.state == OperationState::Running;
        if !wait.is_zero() && running(&receiver.borrow_and_update()) {
            // Whether it changed or the time ran out, the answer is how it stands.
            let _ = tokio::time::timeout(wait, receiver.changed()).await;
        }
        let operation = receiver.borrow().clone();
        Ok(operation)
    }

    /// Waits for an operation's end.
    ///
    /// # Errors
    /// [`Code::NotFound`], or [`Code::TimedOut`] with the operation going on.
    pub async fn ended(&self, id: &str, wait: Duration) -> Result<Operation, ErrorBody> {
        let mut receiver = self.subscribe(id)?;
        let over = receiver.wait_for(|operation| operation.state != OperationState::Running);
        match tokio::time::timeout(wait, over).await {
            Ok(Ok(operation)) => Ok(operation.clone()),
            _ => Err(ErrorBody::new(Code::TimedOut, format!("operation {id} is still under way"))),
        }
    }

    /// Waits for an operation's end, however long that takes.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub async fn over(&self, id: &str) -> Result<Operation, ErrorBody> {
        let mut receiver = self.subscribe(id)?;
        let over = receiver.wait_for(|operation| operation.state != OperationState::Running).await;
        // Its sender lives as long as its entry, and ended ones alone are forgotten.
        over.map(|operation| operation.clone())
            .map_err(|_| ErrorBody::failed(format!("operation {id} was forgotten")))
    }

    /// The user's last move that has ended and is remembered.
    #[must_use]
    pub fn last_move(&self, user: &UserName) -> Option<Operation> {
        let table = self.table();
        let mine = |operation: &Operation| {
            operation.user.as_ref() == Some(user)
                && operation.kind == "migrate"
                && operation.state != OperationState::Running
        };
        table.entries.values().rev().map(|entry| entry.state.borrow().clone()).find(|state| mine(state))
    }

    /// Asks one to stop. What is past its point of no return ends as it would have.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn cancel(&self, id: &str) -> Result<Operation, ErrorBody> {
        let receiver = self.subscribe(id)?;
        if let Some(number) = Self::number(id)
            && let Some(entry) = self.table().entries.get(&number)
        {
            entry.control.cancel();
            entry.stop.send_replace(true);
        }
        let operation = receiver.borrow().clone();
        Ok(operation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn operations() -> (Operations, UserName, HostName) {
        (Operations::new("h1".parse().unwrap()), "alice".parse().unwrap(), "h2".parse().unwrap())
    }

    #[tokio::test]
    async fn an_operation_is_followed_to_its_end() {
        let (operations, alice, h2) = operations();
        let handle = operations.begin("migrate", &alice, &h2);
        let id = handle.id();
        assert_eq!((id.as_str(), Operations::host_of(&id)), ("h1:1", "h1".parse().ok()));
        handle.progress(json!({ "rounds": 2 }));
        assert_eq!(operations.get(&id, Duration::ZERO).await.unwrap().progress, json!({ "rounds": 2 }));
        let task = tokio::spawn(async move { handle.end(Ok(json!(7))) });
        let ended = operations.ended(&id, Duration::from_secs(5)).await.unwrap();
        assert_eq!((ended.state, ended.result), (OperationState::Done, Some(json!(7))));
        task.await.unwrap();
    }

    #[tokio::test]
    async fn cancelling_raises_the_flag_and_an_abandoned_operation_fails() {
        let (operations, alice, h2) = operations();
        let handle = operations.begin("migrate", &alice, &h2);
        let id = handle.id();
        operations.cancel(&id).unwrap();
        assert!(handle.control().is_cancelled());
        drop(handle);
        assert_eq!(operations.get(&id, Duration::ZERO).await.unwrap().state, OperationState::Failed);
        assert_eq!(operations.cancel("h1:99").unwrap_err().code, Code::NotFound);
        assert_eq!(operations.cancel("nonsense").unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn ended_operations_are_forgotten_running_ones_are_not() {
        let (operations, alice, h2) = operations();
        let first = operations.begin("migrate", &alice, &h2);
        let _scrub = operations.begin("scrub", &alice, &h2);
        for _ in 0..2 * KEPT {
            operations.begin("migrate", &alice, &h2).end(Ok(Value::Null));
        }
        assert!(operations.table().entries.len() <= KEPT);
        assert_eq!(operations.under_way(&alice), [(first.id(), h2)]);
        assert_eq!(operations.under_way(&"bob".parse().unwrap()), []);
        assert!(operations.subscribe(&first.id()).is_ok());
    }
}
