//! `kage predict`.

use http::Method;
use kage_host::{api::types::PredictionView, http::Call};
use kage_machine::UserName;

use crate::{
    client::{Client, Failure},
    output::{Output, table},
};

/// `kage predict`.
pub async fn predict(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let call = Call::new(Method::GET, format!("/v1/images/{user}/prediction"));
    let view: PredictionView = client.call(&call).await?;
    output.result(&view, text)
}

fn text(view: &PredictionView) -> String {
    let at = view.at.as_ref().map_or("-", |at| at.as_str());
    let left = view.left_s.map(|left| format!(", {left:.0} s more or less left")).unwrap_or_default();
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let score = if view.window == 0 {
        "nothing scored yet".to_owned()
    } else {
        let (hit1, hit3) = (percent(view.hit1), percent(view.hit3));
        format!("of the last {} changes {hit1} were first, {hit3} among the first three", view.window)
    };
    let next = view.next.iter();
    let rows: Vec<_> = next
        .map(|next| vec![next.ap.to_string(), next.host.to_string(), percent(next.probability)])
        .collect();
    let hosts = view.hosts.iter().map(|host| format!("{} {}", host.host, percent(host.probability)));
    let hosts = hosts.collect::<Vec<_>>().join(", ");
    let mut lines = vec![format!("at        {at}{left}"), format!("right     {score}")];
    if !hosts.is_empty() {
        lines.push(format!("hosts     {hosts}"));
    }
    if !rows.is_empty() {
        lines.push(table(&["NEXT", "HOST", "PROBABILITY"], &rows));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use kage_host::api::types::{HostChance, NextView};

    use super::*;

    #[test]
    fn a_prediction_is_shown_with_how_often_it_was_right() {
        let nothing = PredictionView {
            user: "alice".parse().unwrap(),
            at: None,
            next: Vec::new(),
            hosts: Vec::new(),
            left_s: None,
            window: 0,
            hit1: 0.0,
            hit3: 0.0,
        };
        assert_eq!(text(&nothing), "at        -\nright     nothing scored yet");
        let (ap, host) = ("ap-2".parse().unwrap(), "h2".parse::<kage_machine::HostName>().unwrap());
        let some = PredictionView {
            at: "ap-1".parse().ok(),
            next: vec![NextView { ap, host: host.clone(), probability: 0.7 }],
            hosts: vec![HostChance { host, probability: 0.7 }],
            left_s: Some(40.2),
            window: 10,
            hit1: 0.5,
            hit3: 0.9,
            ..nothing
        };
        assert_eq!(
            text(&some),
            "at        ap-1, 40 s more or less left\n\
             right     of the last 10 changes 50 % were first, 90 % among the first three\n\
             hosts     h2 70 %\nNEXT  HOST  PROBABILITY\nap-2  h2    70 %"
        );
    }
}
