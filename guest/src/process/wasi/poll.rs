//! `poll_oneoff`: waits for clocks, files, pipes, terminals and sockets.

use alloc::{rc::Rc, vec::Vec};
use core::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use super::{
    basic::Clock,
    call::{Call, Guest, Outcome, parts, room},
    descriptor::{Descriptor, Object, rights},
    errno::Errno,
};
use crate::{
    executor,
    process::{State, fiber},
    time,
};

/// Subscriptions in one call.
const MAX_SUBSCRIPTIONS: u32 = 1024;
/// Reading or asking one, in estimated nanoseconds.
const SUBSCRIPTION_COST: u64 = 100;
/// Bytes of a subscription.
const SUBSCRIPTION: u32 = 48;
/// Bytes of an event.
const EVENT: u32 = 32;
/// Event flag: the other side is gone.
const HANGUP: u16 = 1;

enum Wanted {
    /// Guest time at which it is due.
    Clock(Duration),
    Read(Rc<Descriptor>),
    Write(Rc<Descriptor>),
    /// It cannot be waited for.
    Error(Errno),
}

struct Subscription {
    userdata: u64,
    /// Kind of event (`typenames.witx`, `eventtype`).
    kind: u8,
    wanted: Wanted,
}

/// What a subscription comes to.
#[derive(Clone, Copy, Default)]
struct Event {
    error: u16,
    bytes: u64,
    flags: u16,
}

impl Subscription {
    fn read(guest: &Guest<'_>, state: &State, at: u32) -> Outcome<Self> {
        let field = |offset: u32| at.checked_add(offset).ok_or(Errno::Fault);
        let kind = guest.u8(field(8)?)?;
        let wanted = match kind {
            0 => {
                let clock = guest.u32(field(16)?)?;
                let timeout = Duration::from_nanos(guest.u64(field(24)?)?);
                let absolute = guest.u16(field(40)?)? & 1 != 0;
                match Clock::of(clock) {
                    Ok(Clock::Process) => Wanted::Error(Errno::NotSup),
                    Ok(clock) if absolute => {
                        Wanted::Clock(time::now() + timeout.saturating_sub(clock.now(state)))
                    }
                    Ok(_) => Wanted::Clock(time::now().saturating_add(timeout)),
                    Err(_) => Wanted::Error(Errno::Inval),
                }
            }
            1 | 2 => match state.wasi.table.get(guest.u32(field(16)?)?) {
                Err(_) => Wanted::Error(Errno::BadF),
                Ok(descriptor) => {
                    let right = if kind == 1 { rights::FD_READ } else { rights::FD_WRITE };
                    match (&descriptor.object, descriptor.require(right)) {
                        (Object::Directory(_), _) => Wanted::Error(Errno::BadF),
                        (_, Err(_)) => Wanted::Error(Errno::BadF),
                        (_, Ok(())) if kind == 1 => Wanted::Read(descriptor),
                        (_, Ok(())) => Wanted::Write(descriptor),
                    }
                }
            },
            _ => return Err(Errno::Inval.into()),
        };
        Ok(Self { userdata: guest.u64(at)?, kind, wanted })
    }

    fn poll(&self, context: &mut Context<'_>, now: Duration) -> Poll<Event> {
        match &self.wanted {
            Wanted::Error(errno) => Poll::Ready(Event { error: *errno as u16, ..Event::default() }),
            Wanted::Clock(at) if *at <= now => Poll::Ready(Event::default()),
            Wanted::Clock(_) => Poll::Pending,
            Wanted::Read(descriptor) => match &descriptor.object {
                Object::Input(input) => input.poll_readable(context).map(|count| match count {
                    Some(count) => Event { bytes: count as u64, ..Event::default() },
                    None => Event { flags: HANGUP, ..Event::default() },
                }),
                Object::File(file) => {
                    let length = file.handle.stat().map_or(0, |facts| facts.size);
                    let bytes = length.saturating_sub(file.offset.get());
                    Poll::Ready(Event { bytes, ..Event::default() })
                }
                Object::Socket(socket) => socket.poll_readable(context).map(ready),
                Object::Output(_) | Object::Directory(_) => Poll::Ready(Event::default()),
            },
            Wanted::Write(descriptor) => match &descriptor.object {
                Object::Output(output) => output.poll_writable(context).map(|room| match room {
                    Ok(room) => Event { bytes: room as u64, ..Event::default() },
                    Err(_) => Event { flags: HANGUP, ..Event::default() },
                }),
                Object::Socket(socket) => socket.poll_writable(context).map(ready),
                Object::Input(_) | Object::File(_) | Object::Directory(_) => Poll::Ready(Event::default()),
            },
        }
    }
}

fn ready((bytes, gone): (usize, bool)) -> Event {
    Event { bytes: bytes as u64, flags: if gone { HANGUP } else { 0 }, error: 0 }
}

fn write(guest: &mut Guest<'_>, at: u32, subscription: &Subscription, event: Event) -> Outcome {
    let mut bytes = [0; EVENT as usize];
    bytes[..8].copy_from_slice(&subscription.userdata.to_le_bytes());
    bytes[8..10].copy_from_slice(&event.error.to_le_bytes());
    bytes[10] = subscription.kind;
    bytes[16..24].copy_from_slice(&event.bytes.to_le_bytes());
    bytes[24..26].copy_from_slice(&event.flags.to_le_bytes());
    guest.put_bytes(at, &bytes)
}

pub fn poll_oneoff(call: &mut Call<'_>, list: u32, events: u32, count: u32, into: u32) -> Outcome {
    let (mut guest, state) = parts(call)?;
    if count == 0 || count > MAX_SUBSCRIPTIONS {
        return Err(Errno::Inval.into());
    }
    guest.bytes(list, count * SUBSCRIPTION)?;
    guest.bytes(events, count * EVENT)?;
    // What was found is as many again at the most.
    room(count as usize * (size_of::<Subscription>() + size_of::<(usize, Event)>()))?;
    let look = u64::from(count) * SUBSCRIPTION_COST;
    executor::charge(look);
    let mut subscriptions = Vec::with_capacity(count as usize);
    for index in 0..count {
        subscriptions.push(Subscription::read(&guest, state, list + index * SUBSCRIPTION)?);
    }
    let first = subscriptions.iter().filter_map(|subscription| match subscription.wanted {
        Wanted::Clock(at) => Some(at),
        _ => None,
    });
    let mut sleep = first.min().map(time::sleep_until);
    let found = fiber::block_on(poll_fn(|context| {
        let now = time::now();
        executor::charge(look);
        let mut found = Vec::new();
        for (index, subscription) in subscriptions.iter().enumerate() {
            if let Poll::Ready(event) = subscription.poll(context, now) {
                found.push((index, event));
            }
        }
        if found.is_empty() {
            match sleep.as_mut().map(|sleep| Pin::new(sleep).poll(context)) {
                // Due now: to be found so in another look.
                Some(Poll::Ready(())) => context.waker().wake_by_ref(),
                Some(Poll::Pending) | None => {}
            }
            return Poll::Pending;
        }
        Poll::Ready(found)
    }))?;
    let mut at = events;
    for (index, event) in &found {
        let Some(subscription) = subscriptions.get(*index) else { continue };
        write(&mut guest, at, subscription, *event)?;
        at += EVENT;
    }
    guest.put_u32(into, found.len() as u32)
}
