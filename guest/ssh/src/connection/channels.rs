//! Session channels: the peer's messages about them, and the driver's commands.

use alloc::string::String;
use alloc::vec::Vec;

use super::Connection;
use crate::channel::Channel;
use crate::config::MAX_PACKET;
use crate::error::Error;
use crate::event::{ChannelId, Event, Program, Pty, Stream, WindowSize};
use crate::message::{self, open_failure};
use crate::wire::{Reader, Truncated, put_bool, put_string, put_u32};

/// Longest terminal name, variable name, signal name or subsystem name that is taken.
const MAX_NAME: usize = 256;

/// A channel takes no more data: it is gone, or this side ended or closed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the channel takes no more data")]
pub struct ChannelEnded;

impl Connection {
    /// Handles a message about a channel.
    pub(super) fn channel_message(&mut self, number: u8, payload: &[u8]) -> Result<(), Error> {
        let mut reader = Reader::new(payload);
        reader.u8()?;
        if number == message::CHANNEL_OPEN {
            return self.open_request(&mut reader);
        }
        let id = reader.u32()?;
        let channel = self.channels.get_mut(&id).ok_or(Error::NoSuchChannel { channel: id })?;
        let event = match number {
            message::CHANNEL_WINDOW_ADJUST => {
                channel.widen(id, reader.u32()?)?;
                None
            }
            message::CHANNEL_DATA => {
                channel.receive(id, reader.string()?, true)?.then_some(Event::Data { channel: ChannelId(id) })
            }
            message::CHANNEL_EXTENDED_DATA => {
                // Data beside a session's standard input has no meaning, but counts.
                reader.u32()?;
                channel.receive(id, reader.string()?, false)?;
                None
            }
            message::CHANNEL_EOF => {
                let first = !core::mem::replace(&mut channel.peer_ended, true);
                first.then_some(Event::Eof { channel: ChannelId(id) })
            }
            message::CHANNEL_CLOSE => {
                self.close(ChannelId(id));
                self.channels.remove(&id);
                self.unanswered = self.unanswered.filter(|(channel, _)| *channel != id);
                Some(Event::Closed { channel: ChannelId(id) })
            }
            message::CHANNEL_REQUEST => return self.channel_request(id, &mut reader),
            // We open no channels and ask for no replies.
            _ => return Err(Error::Unexpected { number, context: "nothing was asked for on a channel" }),
        };
        self.events.extend(event);
        self.adjust(id);
        Ok(())
    }

    fn open_request(&mut self, reader: &mut Reader<'_>) -> Result<(), Error> {
        let kind = reader.string()?;
        let peer = reader.u32()?;
        let window = reader.u32()?;
        let packet = reader.u32()?;
        let refusal = match kind {
            b"session" if self.no_more_sessions => {
                Some((open_failure::ADMINISTRATIVELY_PROHIBITED, "no more sessions were wanted"))
            }
            b"session" if self.channels.len() >= self.config.limits.channels => {
                Some((open_failure::RESOURCE_SHORTAGE, "too many channels"))
            }
            b"session" => None,
            b"direct-tcpip" | b"direct-streamlocal@openssh.com" | b"tun@openssh.com" => {
                Some((open_failure::ADMINISTRATIVELY_PROHIBITED, "forwarding is not supported"))
            }
            _ => Some((open_failure::UNKNOWN_CHANNEL_TYPE, "no such type of channel")),
        };
        if let Some((code, text)) = refusal {
            let mut reply = Vec::from([message::CHANNEL_OPEN_FAILURE]);
            put_u32(&mut reply, peer);
            put_u32(&mut reply, code);
            put_string(&mut reply, text.as_bytes());
            put_string(&mut reply, b"");
            self.transport.send(&reply);
            return Ok(());
        }
        let id = self.next_channel;
        self.next_channel = id.wrapping_add(1);
        let receive_window = self.config.limits.receive_window;
        self.channels.insert(id, Channel::new(peer, window, packet, receive_window));
        let mut reply = Vec::from([message::CHANNEL_OPEN_CONFIRMATION]);
        for number in [peer, id, receive_window, MAX_PACKET] {
            put_u32(&mut reply, number);
        }
        self.transport.send(&reply);
        self.events.push_back(Event::Opened { channel: ChannelId(id) });
        Ok(())
    }

    fn channel_request(&mut self, id: u32, reader: &mut Reader<'_>) -> Result<(), Error> {
        let kind = reader.string()?;
        let wants_reply = reader.boolean()?;
        let channel = ChannelId(id);
        if let Some(asked) = asked_program(kind, reader)? {
            self.start(id, asked.ok(), wants_reply);
            return Ok(());
        }
        let event = match kind {
            b"pty-req" => {
                let term = reader.string()?;
                let size = window_size(reader)?;
                let modes = reader.string()?;
                let fits = term.len() <= MAX_NAME && modes.len() <= 4 * MAX_NAME;
                fits.then(|| Event::Pty {
                    channel,
                    pty: Pty { term: text(term), size, modes: modes.to_vec() },
                })
            }
            b"env" => {
                let (name, value) = (reader.string()?, reader.string()?);
                let fits = name.len() <= MAX_NAME;
                fits.then(|| Event::Env { channel, name: name.to_vec(), value: value.to_vec() })
            }
            b"window-change" => Some(Event::WindowChange { channel, size: window_size(reader)? }),
            b"signal" => {
                let name = reader.string()?;
                (name.len() <= MAX_NAME).then(|| Event::Signal { channel, name: text(name) })
            }
            // Agent and X11 forwarding, breaks, flow control, and what is yet to be invented.
            _ => None,
        };
        if wants_reply {
            self.reply(id, event.is_some());
        }
        self.events.extend(event);
        Ok(())
    }

    /// Passes a request for a program on; one per channel.
    fn start(&mut self, id: u32, program: Option<Program>, wants_reply: bool) {
        let first =
            self.channels.get_mut(&id).is_some_and(|channel| !core::mem::replace(&mut channel.asked, true));
        match program {
            Some(program) if first => {
                self.unanswered = Some((id, wants_reply));
                self.events.push_back(Event::Start { channel: ChannelId(id), program });
            }
            _ if wants_reply => self.reply(id, false),
            _ => {}
        }
    }

    fn reply(&mut self, id: u32, success: bool) {
        let Some(channel) = self.channels.get(&id) else { return };
        let number = if success { message::CHANNEL_SUCCESS } else { message::CHANNEL_FAILURE };
        let mut reply = Vec::from([number]);
        put_u32(&mut reply, channel.peer);
        self.transport.send(&reply);
    }

    /// Says that the program asked for on a channel runs.
    pub fn accept(&mut self, channel: ChannelId) {
        self.answer(channel, true);
    }

    /// Says that the program asked for on a channel does not run. The channel stays open until closed.
    pub fn refuse(&mut self, channel: ChannelId) {
        self.answer(channel, false);
    }

    fn answer(&mut self, channel: ChannelId, success: bool) {
        if let Some((id, wants_reply)) = self.unanswered.filter(|(id, _)| *id == channel.0) {
            self.unanswered = None;
            if wants_reply {
                self.reply(id, success);
            }
        }
    }

    /// Replies come in the order of the requests, so the next request must not find an earlier one unanswered.
    pub(super) fn refuse_unanswered(&mut self) {
        if let Some((id, _)) = self.unanswered {
            self.refuse(ChannelId(id));
        }
    }

    /// What arrived on a channel and was not consumed; nothing for a channel that is gone.
    pub fn data(&self, channel: ChannelId) -> &[u8] {
        self.channels.get(&channel.0).map(Channel::unread).unwrap_or_default()
    }

    /// Forgets `count` bytes of a channel's data, so that the peer may send more.
    pub fn consume(&mut self, channel: ChannelId, count: usize) {
        if let Some(state) = self.channels.get_mut(&channel.0) {
            state.consume(count);
        }
        self.adjust(channel.0);
    }

    /// Whether the peer sends no more on a channel, and all it sent was consumed.
    pub fn is_at_end(&self, channel: ChannelId) -> bool {
        self.channels.get(&channel.0).is_none_or(|state| state.peer_ended && state.unread().is_empty())
    }

    /// Bytes [`Connection::write`] would take now.
    pub fn writable(&self, channel: ChannelId) -> usize {
        let window = self.channels.get(&channel.0).map_or(0, Channel::send_window);
        window.min(self.transport.room())
    }

    /// Sends as much of `data` as the peer's window and the output take, and returns how much. What is left is for
    /// another time: after output was sent, or input was taken.
    ///
    /// # Errors
    /// [`ChannelEnded`]: nobody will ever take it.
    pub fn write(&mut self, channel: ChannelId, stream: Stream, data: &[u8]) -> Result<usize, ChannelEnded> {
        let state = self.channels.get_mut(&channel.0).ok_or(ChannelEnded)?;
        if state.ended || state.closed {
            return Err(ChannelEnded);
        }
        let mut rest = data;
        loop {
            let (now, later) = rest
                .split_at_checked(state.portion(rest.len(), self.transport.room()))
                .unwrap_or((&[], rest));
            if now.is_empty() {
                return Ok(data.len() - rest.len());
            }
            let peer = state.peer;
            let sealed = self.transport.send_data(|out| {
                match stream {
                    Stream::Out => {
                        out.push(message::CHANNEL_DATA);
                        put_u32(out, peer);
                    }
                    Stream::Err => {
                        out.push(message::CHANNEL_EXTENDED_DATA);
                        put_u32(out, peer);
                        put_u32(out, message::EXTENDED_STDERR);
                    }
                }
                put_string(out, now);
            });
            if sealed.is_err() {
                return Ok(data.len() - rest.len());
            }
            state.spend(now.len());
            rest = later;
        }
    }

    /// Tells the peer how the program ended. Once per channel, before [`Connection::close`].
    pub fn exit_status(&mut self, channel: ChannelId, status: u32) {
        self.session_request(channel, b"exit-status", |out| put_u32(out, status));
    }

    /// Tells the peer which signal (`TERM`, `KILL`, …) ended the program.
    pub fn exit_signal(&mut self, channel: ChannelId, signal: &str, text: &str) {
        self.session_request(channel, b"exit-signal", |out| {
            put_string(out, signal.as_bytes());
            put_bool(out, false);
            put_string(out, text.as_bytes());
            put_string(out, b"");
        });
    }

    fn session_request(&mut self, channel: ChannelId, kind: &[u8], arguments: impl FnOnce(&mut Vec<u8>)) {
        let Some(state) = self.channels.get(&channel.0).filter(|state| !state.closed) else { return };
        let mut request = Vec::from([message::CHANNEL_REQUEST]);
        put_u32(&mut request, state.peer);
        put_string(&mut request, kind);
        put_bool(&mut request, false);
        arguments(&mut request);
        self.transport.send(&request);
    }

    /// Sends no more data on a channel.
    pub fn eof(&mut self, channel: ChannelId) {
        let Some(state) = self.channels.get_mut(&channel.0).filter(|state| !state.ended && !state.closed)
        else {
            return;
        };
        state.ended = true;
        let mut eof = Vec::from([message::CHANNEL_EOF]);
        put_u32(&mut eof, state.peer);
        self.transport.send(&eof);
    }

    /// Closes a channel. It is gone, with an event, when the peer closed it too.
    pub fn close(&mut self, channel: ChannelId) {
        let Some(state) = self.channels.get_mut(&channel.0).filter(|state| !state.closed) else { return };
        state.closed = true;
        let unread = state.unread().len();
        state.consume(unread);
        let mut close = Vec::from([message::CHANNEL_CLOSE]);
        put_u32(&mut close, state.peer);
        self.transport.send(&close);
    }

    /// Ends a channel as a program's end does: exit status, EOF, CLOSE.
    pub fn finish(&mut self, channel: ChannelId, status: u32) {
        self.exit_status(channel, status);
        self.eof(channel);
        self.close(channel);
    }

    /// Grants the peer what the program has read, when that is enough.
    fn adjust(&mut self, id: u32) {
        let Some(state) = self.channels.get_mut(&id) else { return };
        if let Some(granted) = state.take_adjustment() {
            let mut adjust = Vec::from([message::CHANNEL_WINDOW_ADJUST]);
            put_u32(&mut adjust, state.peer);
            put_u32(&mut adjust, granted);
            self.transport.send(&adjust);
        }
    }
}

/// A program whose name is beyond all reason.
struct Unreasonable;

/// The program a request of that kind asks for; none for a request that asks for something else.
fn asked_program(
    kind: &[u8],
    reader: &mut Reader<'_>,
) -> Result<Option<Result<Program, Unreasonable>>, Truncated> {
    Ok(Some(match kind {
        b"shell" => Ok(Program::Shell),
        b"exec" => Ok(Program::Exec(reader.string()?.to_vec())),
        b"subsystem" => {
            let name = reader.string()?;
            if name.len() <= MAX_NAME { Ok(Program::Subsystem(text(name))) } else { Err(Unreasonable) }
        }
        _ => return Ok(None),
    }))
}

fn window_size(reader: &mut Reader<'_>) -> Result<WindowSize, Truncated> {
    Ok(WindowSize {
        columns: reader.u32()?,
        rows: reader.u32()?,
        width_px: reader.u32()?,
        height_px: reader.u32()?,
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
