//! A user is at an access point: word of it goes to the machine's owner, which learns from it and judges.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kage_directory::Wanted;
use kage_machine::HostName;
use serde_json::json;

use super::{
    chase::{Place, Rest},
    following::Progress,
};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{RoamAction, RoamReply, RoamRequest},
    },
    events::now_ms,
    http::Call,
    lifecycle::{Daemon, Image, blocking},
};

use kage_directory::Records as _;

/// How many owners one roam is taken to, when the machine keeps moving on.
const MOST_TURNS: u32 = 4;

impl Daemon {
    /// Takes in that a user is at an access point. Its owner judges what that means for the machine; `hops` is
    /// above zero where another host asks the owner.
    ///
    /// # Errors
    /// An unknown user or access point; a move that could not begin.
    pub async fn roam(self: &Arc<Self>, request: &RoamRequest, hops: u8) -> Result<RoamReply, ErrorBody> {
        let (daemon, wish) = (self.clone(), request.clone());
        let host = blocking(move || {
            let ap = daemon.directory.read::<kage_directory::ApRecord>(&wish.ap)?.ok_or_else(|| {
                ErrorBody::new(
                    Code::NotFound,
                    format!("access point {} is unknown; `kage hosts` lists those there are", wish.ap),
                )
            })?;
            if let Some(device) = wish.device
                && ap.record.host == daemon.me
            {
                daemon.existing(&wish.user)?;
                daemon.attach_device(device, &wish.user, &wish.ap, now_ms())?;
            }
            Ok(ap.record.host)
        })
        .await?;
        let reply = self.tell_owner(request, &host, hops).await?;
        if hops == 0 {
            let details = json!({
                "ap": request.ap, "to": host, "action": reply.action, "operation": reply.operation,
            });
            self.events.emit("roam", Some(&request.user), details);
        }
        Ok(reply)
    }

    /// Has the owner judge a roam, whoever that is by then.
    pub(super) async fn tell_owner(
        self: &Arc<Self>,
        request: &RoamRequest,
        host: &HostName,
        hops: u8,
    ) -> Result<RoamReply, ErrorBody> {
        let begun = Instant::now();
        let mut turns = 1;
        loop {
            let since = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            let request =
                RoamRequest { age_ms: request.age_ms.saturating_add(since), device: None, ..request.clone() };
            match self.judge_roam(&request, host, hops).await {
                // It went elsewhere meanwhile: its new owner judges.
                Err(error) if error.code == Code::OwnershipLost && hops == 0 && turns < MOST_TURNS => {
                    turns += 1
                }
                judged => return judged,
            }
        }
    }

    /// Has the image's owner judge a roam, which may be this host.
    async fn judge_roam(
        self: &Arc<Self>,
        request: &RoamRequest,
        host: &HostName,
        hops: u8,
    ) -> Result<RoamReply, ErrorBody> {
        // By this host's own clock, whatever the reporting host's says. Only among owners order counts for more.
        let now = now_ms();
        let at_ms = request.at_ms.unwrap_or_else(|| now.saturating_sub(request.age_ms)).min(now);
        let (daemon, wish) = (self.clone(), request.clone());
        let (record, is_known_better) = blocking(move || {
            let record = daemon.existing(&wish.user)?.record;
            // Word of no known time counts only where nothing else is known.
            let is_at = || daemon.predictions.outlook(&wish.user, now).at;
            let is_known_better = at_ms == 0 && is_at().is_some_and(|at| at != wish.ap);
            if record.owner == daemon.me && !is_known_better {
                daemon.learn(&wish.user, &wish.ap, at_ms);
            }
            Ok((record, is_known_better))
        })
        .await?;
        let mut reply = RoamReply {
            user: request.user.clone(),
            ap: request.ap.clone(),
            host: host.clone(),
            action: RoamAction::Stays,
            operation: None,
            report: None,
        };
        if record.wanted == Wanted::Stopped {
            reply.action = RoamAction::Stopped;
        } else if record.owner == self.me && (is_known_better || self.is_cordoned(host)) {
            // A cordoned host gets no machines, and those that leave it are not called back: it stays where it is.
            return Ok(reply);
        } else if record.owner == self.me {
            let place = Place { ap: request.ap.clone(), host: host.clone(), at_ms };
            self.bring(place, request.wait, &mut reply).await?;
        } else if hops > 0 {
            return Err(self.went_to(&request.user, &record.owner));
        } else {
            let call = Call::new(http::Method::POST, "/v1/roam").json(request);
            let call = Call { hops: 1, ..call }.patience(self.roam_patience());
            let asked = match self.peers.call(&record.owner, self.address(&record.owner)?, &call).await {
                Ok(answer) => answer.into_value(),
                Err(error) => Err(error),
            };
            match asked {
                Ok(answer) => reply = answer,
                // Where it is its user is too, whatever became of its host.
                Err(error) if record.owner == *host && error.code == Code::Unreachable => {}
                Err(error) => return Err(error),
            }
        }
        Ok(reply)
    }

    /// Has a machine that this host owns follow its user, and says what that begins with; with `wait`, what it comes to.
    async fn bring(
        self: &Arc<Self>,
        place: Place,
        wait: bool,
        reply: &mut RoamReply,
    ) -> Result<(), ErrorBody> {
        let image = self.image(&reply.user);
        let age = Duration::from_millis(now_ms().saturating_sub(place.at_ms));
        let now = Instant::now();
        let under_way = self.operations.under_way(&reply.user);
        let seen = image.following.seen(place, &under_way, now.checked_sub(age).unwrap_or(now));
        // Otherwise something later is known: whoever told that is answered by what comes of it.
        let Some(goal) = seen else { return Ok(()) };
        let mut over = image.following.over();
        let first = self.advance(&image).await;
        self.keep_following(&image);
        match first? {
            Progress::Rest(Rest::There | Rest::Overruled) => return Ok(()),
            Progress::Rest(Rest::Stopped) => {
                reply.action = RoamAction::Stopped;
                return Ok(());
            }
            Progress::PassOn(_) => return Err(self.now_elsewhere(&image).await?),
            Progress::Recalls(_) => {}
            Progress::Comes(id) => reply.operation = Some(id),
            Progress::Begun(id) => {
                reply.action = RoamAction::Moves;
                reply.operation = Some(id);
            }
            Progress::Awaits(_) | Progress::Waits(_) => reply.action = RoamAction::Moves,
        }
        if !wait {
            return Ok(());
        }
        if let Some(id) = &reply.operation {
            reply.report = Some(self.await_move(id).await?);
            return Ok(());
        }
        let told = async {
            // The sender lives as long as the image.
            while over.changed().await.is_ok() && over.borrow_and_update().goal < goal {}
            over.borrow().clone()
        };
        match tokio::time::timeout(self.roam_patience(), told).await {
            Ok(over) if over.goal == goal => {
                (reply.action, reply.report) = over.came_to?;
                Ok(())
            }
            Ok(_) => Err(ErrorBody::new(Code::Cancelled, format!("{} is elsewhere by now", reply.user))),
            Err(_) => {
                let message = format!("{}'s machine is still on its way to {}", reply.user, reply.host);
                Err(ErrorBody::new(Code::TimedOut, message))
            }
        }
    }

    /// Longest wait for what a roam comes to.
    fn roam_patience(&self) -> Duration {
        self.config.dwell.duration() + 2 * self.move_patience()
    }

    async fn now_elsewhere(self: &Arc<Self>, image: &Arc<Image>) -> Result<ErrorBody, ErrorBody> {
        let (daemon, user) = (self.clone(), image.user.clone());
        let owner = blocking(move || Ok(daemon.existing(&user)?.record.owner)).await?;
        Ok(self.went_to(&image.user, &owner))
    }
}
