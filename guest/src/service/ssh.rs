//! SSH on port 22: one task per connection, a session task per channel.
//!
//! The connection's task only carries bytes, between the socket, the protocol and the sessions' pipes. Each of these
//! is bounded and each wakes the task when it can go on, so a reader that waits stops the writer at the other end.
//! A connection that ends takes its sessions, and so their commands, with it.

use alloc::{rc::Rc, string::String, sync::Arc, vec::Vec};
use core::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use kage_ssh::{
    Account, ChannelId, Config, Connection, Event, Limits, Program, Stream as Which,
    keys::{AuthorizedKey, HostKey},
};

use crate::{
    arch, executor,
    local::Local,
    log,
    net::{Buffers, Closed, Listener, Stream},
    random,
    shell::{pipe, session},
    time::{self, Sleep},
};

const PORT: u16 = 22;
const BUFFERS: Buffers = Buffers { receive: 128 << 10, send: 128 << 10, backlog: 4 };
/// Connections at a time.
const MOST: usize = 32;
/// A client that has not proved a key by then is let go.
const GRACE: Duration = Duration::from_secs(60);
/// Bounds of a connection: what waits in the socket's buffers bounds the speed sooner than these.
const LIMITS: Limits = Limits {
    channels: 8,
    receive_window: 256 << 10,
    output: 48 << 10,
    auth_failures: 6,
    rekey_bytes: 1 << 30,
};
/// Bytes deciphered or ciphered in one go.
const PORTION: usize = 8 << 10;
/// Cipher and code of a byte, in estimated nanoseconds.
const CIPHER_COST: u64 = 5;

/// The configuration made of a version of the config page.
static CONFIG: Local<Option<(u32, Arc<Config>)>> = Local::new();

/// Starts listening.
pub fn start() {
    CONFIG.set(None);
    executor::spawn("ssh listener", async {
        let mut listener = Listener::bind(PORT, BUFFERS);
        let open = Rc::new(Cell::new(0));
        loop {
            let stream = listener.accept().await;
            if open.get() >= MOST {
                log!("ssh: {MOST} connections are open; one more is refused");
                continue;
            }
            open.set(open.get() + 1);
            let open = Rc::clone(&open);
            executor::spawn("ssh", async move {
                serve(stream).await;
                open.set(open.get() - 1);
            });
        }
    });
}

/// The configuration of now; made when the first connection asks for it, because making keys takes time that a
/// login need not wait for.
fn config() -> Arc<Config> {
    let version = arch::mail().config_version;
    let mut kept = CONFIG.get();
    if let Some((_, config)) = kept.as_ref().filter(|(made, _)| *made == version) {
        return Arc::clone(config);
    }
    let page = arch::config();
    let text = page.authorized_keys.get(..usize::from(page.authorized_keys_length)).unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let keys =
        text.lines().filter_map(|line| AuthorizedKey::parse(line).ok()).map(|entry| entry.key).collect();
    let account = Account { user: super::user(page), keys };
    let config = Arc::new(Config {
        host_key: HostKey::from_seed(&page.host_key_seed),
        accounts: Vec::from([account]),
        limits: LIMITS,
    });
    *kept = Some((version, Arc::clone(&config)));
    config
}

async fn serve(stream: Stream) {
    let config = config();
    let user = config.accounts.first().map(|account| account.user.clone()).unwrap_or_default();
    let mut driver = Driver {
        stream,
        connection: Connection::new(config, random::fill),
        user,
        channels: Vec::new(),
        grace: Some(time::sleep(GRACE)),
    };
    let ended = poll_fn(|context| driver.poll(context)).await;
    if ended.is_err() {
        log!("ssh: a connection was lost");
    }
}

/// A channel of the connection.
struct Channel {
    id: ChannelId,
    /// Width of its terminal, if it has one.
    columns: Option<u32>,
    running: Option<session::Running>,
    /// The signal that ended its session.
    killed: Option<String>,
    finished: bool,
}

struct Driver {
    stream: Stream,
    connection: Connection,
    user: String,
    channels: Vec<Channel>,
    /// Until the user is authenticated.
    grace: Option<Sleep>,
}

impl Driver {
    /// Carries what can be carried, until nothing moves or the round has had enough.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if let Some(grace) = &mut self.grace {
            if self.connection.is_authenticated() {
                self.grace = None;
            } else if Pin::new(grace).poll(context).is_ready() {
                self.connection.disconnect("no key was proved in time");
                self.grace = None;
            }
        }
        loop {
            let mut moved = 0;
            while let Some(event) = self.connection.event() {
                moved += 1;
                self.handle(event);
            }
            if self.connection.takes_input() && !self.connection.is_closed() {
                match self.take_input(context) {
                    Poll::Ready(Ok(Some(count))) => moved += count,
                    Poll::Ready(Ok(None)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            for index in 0..self.channels.len() {
                moved += self.carry(index, context);
            }
            self.channels.retain(|channel| !channel.finished);
            let output = self.connection.output();
            if !output.is_empty() {
                match self.stream.poll_write(context, output) {
                    Poll::Ready(Ok(count)) => {
                        self.connection.sent(count);
                        moved += count;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            if self.connection.is_closed() && self.connection.output().is_empty() {
                return Poll::Ready(Ok(()));
            }
            if moved == 0 {
                return Poll::Pending;
            }
            if executor::charge(moved as u64 * CIPHER_COST / 2) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Gives the protocol what arrived; the count it took, or `None` when the client is gone.
    fn take_input(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<usize>, Closed>> {
        let connection = &mut self.connection;
        self.stream.poll_take(context, |bytes| {
            let portion = &bytes[..bytes.len().min(PORTION)];
            match connection.input(portion) {
                Ok(count) => (count, count),
                Err(error) => {
                    log!("ssh: {error}");
                    (portion.len(), portion.len())
                }
            }
        })
    }

    fn channel(&mut self, id: ChannelId) -> Option<&mut Channel> {
        self.channels.iter_mut().find(|channel| channel.id == id)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Authenticated { user, fingerprint } => match self.stream.peer() {
                Some(peer) => log!("ssh: {user} by {fingerprint} from {peer}"),
                None => log!("ssh: {user} by {fingerprint}"),
            },
            Event::Opened { channel } => {
                let fresh =
                    Channel { id: channel, columns: None, running: None, killed: None, finished: false };
                self.channels.push(fresh);
            }
            Event::Pty { channel, pty } => {
                if let Some(channel) = self.channel(channel) {
                    channel.columns = Some(pty.size.columns);
                }
            }
            Event::Start { channel, program } => self.start(channel, program),
            Event::WindowChange { channel, size } => {
                if let Some(running) = self.channel(channel).and_then(|channel| channel.running.as_ref()) {
                    running.session.resize(size.columns);
                }
            }
            Event::Signal { channel, name } => {
                let Some(channel) = self.channel(channel) else { return };
                let Some(running) = &channel.running else { return };
                match name.as_str() {
                    "INT" => running.session.interrupt.raise(),
                    "TERM" | "HUP" | "KILL" | "QUIT" => {
                        running.kill();
                        channel.killed = Some(name);
                    }
                    _ => {}
                }
            }
            Event::Closed { channel } => self.channels.retain(|kept| kept.id != channel),
            // Data and its end are looked for at each turn; nothing here depends on the environment.
            Event::Data { .. } | Event::Eof { .. } | Event::Env { .. } | Event::Disconnected { .. } => {}
        }
    }

    fn start(&mut self, id: ChannelId, program: Program) {
        let what = match program {
            Program::Shell => session::What::Shell,
            Program::Exec(line) => match String::from_utf8(line) {
                Ok(line) => session::What::Line(line),
                Err(_) => return self.refuse(id),
            },
            Program::Subsystem(name) if name == "sftp" => session::What::Files,
            Program::Subsystem(_) => return self.refuse(id),
        };
        let user = self.user.clone();
        let Some(channel) = self.channel(id) else { return };
        channel.running = Some(session::start(&user, what, channel.columns));
        self.connection.accept(id);
    }

    fn refuse(&mut self, id: ChannelId) {
        self.connection.refuse(id);
        self.connection.close(id);
    }

    /// Carries a channel's bytes; returns how many moved.
    fn carry(&mut self, index: usize, context: &mut Context<'_>) -> usize {
        let Self { connection, channels, .. } = self;
        let Some(channel) = channels.get_mut(index) else { return 0 };
        let Some(running) = &channel.running else { return 0 };
        let id = channel.id;
        let mut moved = 0;

        let data = connection.data(id);
        if !data.is_empty() {
            let count = match running.input.poll_write(context, &data[..data.len().min(PORTION)]) {
                Poll::Ready(Ok(count)) => count,
                // Nobody reads it: it is taken and forgotten, as the input of a program that has ended is.
                Poll::Ready(Err(pipe::Broken)) => data.len(),
                Poll::Pending => 0,
            };
            connection.consume(id, count);
            moved += count;
        }
        if connection.is_at_end(id) {
            running.input.end();
        }

        for (reader, which) in [(&running.output, Which::Out), (&running.error, Which::Err)] {
            if connection.writable(id) == 0 {
                // Room comes with input taken or output sent, and both wake this task; what matters here is the end.
                continue;
            }
            let taken = reader.poll_take(context, |bytes| {
                let portion = &bytes[..bytes.len().min(PORTION)];
                // A channel that takes no more swallows what is left.
                let count = connection.write(id, which, portion).unwrap_or(portion.len());
                (count, count)
            });
            if let Poll::Ready(Some(count)) = taken {
                moved += count;
            }
        }

        if running.output.is_at_end() && running.error.is_at_end() {
            match (running.status(), &channel.killed) {
                (Some(status), _) => connection.finish(id, status),
                (None, killed) => {
                    let signal = killed.as_deref().unwrap_or("KILL");
                    connection.exit_signal(id, signal, "ended by a signal");
                    connection.eof(id);
                    connection.close(id);
                }
            }
            channel.running = None;
            channel.finished = true;
            moved += 1;
        }
        moved
    }
}
