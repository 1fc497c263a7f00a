//! `wait events logs`.

use std::time::{Duration, Instant};

use http::Method;
use kage_host::{
    api::types::{ImageView, LogView, State},
    events::Event,
    http::Call,
};
use kage_machine::{HostName, UserName};

use crate::{
    client::{Client, Failure, is_timeout},
    output::{Output, print, shown, shown_lines},
};

/// Longest wait the daemon takes in one call.
const ONE_CALL: Duration = Duration::from_secs(50);

/// Pause between two looks at a log.
const LOG_PAUSE: Duration = Duration::from_millis(200);

/// `kage wait`.
pub async fn wait(
    client: Client,
    user: UserName,
    state: Option<State>,
    at: Option<HostName>,
    timeout: Duration,
    output: Output,
) -> Result<(), Failure> {
    if state.is_none() && at.is_none() {
        return Err(Failure::usage("say what to wait for: --state, --at or both"));
    }
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(ONE_CALL);
        let mut path = format!("/v1/images/{user}?timeout={}ms", left.as_millis().max(1));
        if let Some(state) = state {
            path.push_str(&format!("&state={}", state.name()));
        }
        if let Some(at) = &at {
            path.push_str(&format!("&at={at}"));
        }
        let call = Call::new(Method::GET, path).patience(left + Duration::from_secs(10));
        match client.call::<ImageView>(&call).await {
            Ok(view) => {
                return output.result(&view, |view| {
                    format!("{} is {} at {}", view.user, view.state.name(), view.host)
                });
            }
            Err(error) if is_timeout(&error) && Instant::now() < deadline => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `kage events`.
pub async fn events(client: Client, follow: bool, after: u64, output: Output) -> Result<(), Failure> {
    let show = |event: &Event| -> Result<(), Failure> {
        if output.is_json() {
            return print(&serde_json::to_string(event).map_err(Failure::new)?);
        }
        print(&shown(&line(event)))
    };
    if !follow {
        let path = format!("/v1/events?follow=false&after={after}");
        let events: Vec<Event> = client.call(&Call::new(Method::GET, path)).await?;
        return output.result(&events, |events| {
            events.iter().map(|event| shown(&line(event)).into_owned()).collect::<Vec<_>>().join("\n")
        });
    }
    tokio::select! {
        ended = client.follow(after, show) => Err(ended),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

fn line(event: &Event) -> String {
    let seconds = event.at_ms / 1000 % 86_400;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let user = event.user.as_ref().map_or("-", UserName::as_str);
    let details: Vec<String> = event
        .details
        .iter()
        .map(|(name, value)| match value {
            serde_json::Value::String(text) => format!("{name}={text}"),
            other => format!("{name}={other}"),
        })
        .collect();
    let millis = event.at_ms % 1000;
    format!(
        "{hours:02}:{minutes:02}:{rest:02}.{millis:03} {:>5} {:<6} {:<14} {user:<10} {}",
        event.id,
        event.host.as_str(),
        event.kind,
        details.join(" ")
    )
}

/// `kage logs`.
pub async fn logs(client: Client, user: UserName, follow: bool, output: Output) -> Result<(), Failure> {
    let mut after = 0;
    loop {
        let view: LogView =
            client.call(&Call::new(Method::GET, format!("/v1/images/{user}/logs?after={after}"))).await?;
        if !follow {
            return output.result(&view, |view| shown_lines(&view.text));
        }
        if !view.text.is_empty() {
            output.result(&view, |view| shown_lines(&view.text))?;
        }
        after = view.next;
        tokio::select! {
            () = tokio::time::sleep(LOG_PAUSE) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let event = Event {
            id: 7,
            at_ms: 3_723_004,
            host: "h1".parse().unwrap(),
            kind: "roam".into(),
            user: "alice".parse().ok(),
            details: serde_json::Map::from_iter([("ap".to_owned(), "ap-2".into())]),
        };
        assert_eq!(line(&event), "01:02:03.004     7 h1     roam           alice      ap=ap-2");
    }
}
