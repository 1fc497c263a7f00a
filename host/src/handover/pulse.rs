//! The heartbeat: what the guest itself felt of a move.

use std::{mem::offset_of, sync::Arc};

use kage_abi::{BootPage, Heartbeat};
use kage_machine::{Memory, PAGE_SIZE, PageBytes, PageIndex, UserName};
use kage_migrate::{Outcome, Report};

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{Pulse, PulseRequest},
    },
    http::Call,
    lifecycle::{Daemon, blocking},
};

/// Reads the figures from the machine's first page. They are the guest's word: numbers, whatever they are.
fn figures(memory: &dyn Memory) -> Pulse {
    let mut page: PageBytes = [0; PAGE_SIZE];
    memory.read(PageIndex((kage_abi::offset::BOOT / PAGE_SIZE as u64) as u32), &mut page);
    let at = |field: usize| {
        let start = offset_of!(BootPage, heartbeat) + field;
        page.get(start..start + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of a moment")]
    let ms = |ns: u64| ns as f64 / 1e6;
    Pulse {
        beats: at(offset_of!(Heartbeat, beats)),
        gap_ms: ms(at(offset_of!(Heartbeat, longest_ns))),
        stall_ms: ms(at(offset_of!(Heartbeat, stall_ns))),
        dropped_frames: 0,
    }
}

impl Daemon {
    /// Says what the heartbeat of a machine on this host saw, then turns it on or off.
    ///
    /// # Errors
    /// When it does not run here.
    pub async fn pulse(self: &Arc<Self>, user: &UserName, on: bool) -> Result<Pulse, ErrorBody> {
        let image = self.image(user);
        let not_here =
            || ErrorBody::new(Code::Busy, format!("{}'s machine does not run at {}", image.user, self.me));
        let Ok(mut slot) = image.slot.clone().try_lock_owned() else {
            // Moving again: what was seen so far, and the heartbeat is the move's.
            return image.status().memory.map(|memory| figures(&*memory)).ok_or_else(not_here);
        };
        let daemon = self.clone();
        let pulse = blocking(move || {
            let number = slot.spec.as_ref().map(|spec| spec.number);
            let Some(machine) = &mut slot.machine else { return Ok(None) };
            let mut pulse = figures(&*machine.memory());
            machine.heartbeat(on)?;
            pulse.dropped_frames =
                machine.dropped_frames() + number.map_or(0, |number| daemon.net.tap_drops(number));
            Ok(Some(pulse))
        })
        .await?;
        pulse.ok_or_else(not_here)
    }

    /// Ends the heartbeat of a move wherever the machine is now.
    pub(super) async fn pulse_anywhere(
        self: &Arc<Self>,
        user: &UserName,
        report: &Report,
    ) -> Result<Pulse, ErrorBody> {
        if report.outcome != Outcome::HandedOver {
            return self.pulse(user, false).await;
        }
        let call = Call::new(http::Method::POST, format!("/v1/images/{user}/pulse"))
            .json(&PulseRequest { on: false });
        let call = Call { hops: 1, ..call };
        self.peers.call(&report.to, self.address(&report.to)?, &call).await?.into_value()
    }
}
