//! What a command reads and writes: pipes, the terminal, files.

use alloc::{rc::Rc, string::String, vec::Vec};
use core::{
    cell::RefCell,
    future::poll_fn,
    task::{Context, Poll, ready},
};

use kage_ssh::line::{self, LineEditor, for_terminal};

use super::{Failure, pipe};
use crate::fs::{self, FileError, Kind, OpenFile, OpenOptions};

/// Bytes shown on a terminal in one go; twice as many with the carriage returns.
const PORTION: usize = 4 << 10;

/// Where a command's input comes from.
#[derive(Clone)]
pub enum Input {
    /// A pipe, perhaps to the user.
    Pipe(pipe::Reader),
    /// The user's keyboard.
    Terminal(Terminal),
    /// A file.
    File(NamedFile),
}

impl Input {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn open(path: &str) -> Result<Self, Failure> {
        NamedFile::open(path, OpenOptions::default(), false).map(Self::File)
    }

    /// Reads; 0 at the end.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub async fn read(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        poll_fn(|context| self.poll_read(context, into)).await
    }

    /// Reads what is there; 0 at the end.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn poll_read(&self, context: &Context<'_>, into: &mut [u8]) -> Poll<Result<usize, Failure>> {
        match self {
            Self::Pipe(reader) => {
                let taken = reader.poll_take(context, |bytes| {
                    let count = bytes.len().min(into.len());
                    into[..count].copy_from_slice(&bytes[..count]);
                    (count, count)
                });
                taken.map(|count| Ok(count.unwrap_or(0)))
            }
            Self::Terminal(terminal) => terminal.0.borrow_mut().poll_read(context, into).map(Ok),
            Self::File(named) => named.file.poll_read(context, into).map_err(|error| named.failure(error)),
        }
    }

    /// Ready when there is something to read, with about how much; `None` at the end of what others write.
    pub fn poll_readable(&self, context: &Context<'_>) -> Poll<Option<usize>> {
        match self {
            Self::Pipe(reader) => reader.poll_readable(context),
            Self::Terminal(terminal) => terminal.0.borrow_mut().poll_line(context),
            Self::File(named) => {
                let length = named.file.handle.stat().map_or(0, |facts| facts.size);
                let left = length.saturating_sub(named.file.offset.get());
                Poll::Ready(Some(usize::try_from(left).unwrap_or(usize::MAX)))
            }
        }
    }
}

/// An open file, and the path it had then.
#[derive(Clone)]
pub struct NamedFile {
    path: Rc<str>,
    /// The file; whoever shares it moves its position.
    pub file: Rc<OpenFile>,
}

impl NamedFile {
    fn open(path: &str, options: OpenOptions, append: bool) -> Result<Self, Failure> {
        let failure = |error| Failure::File(path.into(), error);
        let handle = fs::open(path, options).map_err(failure)?;
        if handle.stat().map_err(failure)?.kind == Kind::Directory {
            return Err(failure(FileError::IsDirectory));
        }
        Ok(Self { path: Rc::from(path), file: Rc::new(OpenFile::new(handle, append)) })
    }

    fn failure(&self, error: FileError) -> Failure {
        Failure::File(String::from(&*self.path), error)
    }
}

/// Where a command's output goes.
#[derive(Clone)]
pub enum Output {
    /// A pipe, perhaps to the user.
    Pipe(pipe::Writer),
    /// A terminal, which wants a carriage return before each line feed.
    Terminal(pipe::Writer),
    /// A file.
    File(NamedFile),
}

impl Output {
    /// Opens a file, which is made if there is none, and emptied if nothing is to be appended.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn open(path: &str, append: bool) -> Result<Self, Failure> {
        let options = OpenOptions { create: true, truncate: !append, ..OpenOptions::default() };
        NamedFile::open(path, options, append).map(Self::File)
    }

    /// Writes everything.
    ///
    /// # Errors
    /// [`Failure::Broken`] when nobody reads any more, [`Failure::File`].
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = poll_fn(|context| self.poll_write(context, rest)).await?;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Writes what there is room for.
    ///
    /// # Errors
    /// As [`Output::write`].
    pub fn poll_write(&self, context: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Failure>> {
        match self {
            Self::Pipe(writer) => writer.poll_write(context, bytes).map_err(|pipe::Broken| Failure::Broken),
            Self::Terminal(writer) => {
                let portion = &bytes[..bytes.len().min(PORTION)];
                let shown = for_terminal(portion);
                let room = ready!(writer.poll_writable(context, shown.len()));
                let written = room.and_then(|_| match writer.poll_write(context, &shown) {
                    Poll::Ready(Err(pipe::Broken)) => Err(pipe::Broken),
                    // There was room for all of it.
                    Poll::Ready(Ok(_)) | Poll::Pending => Ok(portion.len()),
                });
                Poll::Ready(written.map_err(|pipe::Broken| Failure::Broken))
            }
            Self::File(named) => named.file.poll_write(context, bytes).map_err(|error| named.failure(error)),
        }
    }

    /// Ready when there is room for something, with about how much.
    ///
    /// # Errors
    /// [`Failure::Broken`].
    pub fn poll_writable(&self, context: &Context<'_>) -> Poll<Result<usize, Failure>> {
        match self {
            Self::Pipe(writer) | Self::Terminal(writer) => {
                writer.poll_writable(context, 2 * PORTION).map_err(|pipe::Broken| Failure::Broken)
            }
            Self::File(_) => Poll::Ready(Ok(PORTION)),
        }
    }
}

/// Standard input, output and error.
#[derive(Clone)]
pub struct Stdio {
    /// Input.
    pub input: Input,
    /// Output.
    pub output: Output,
    /// Errors.
    pub error: Output,
}

/// A keyboard as programs see it: whole lines, edited and echoed.
#[derive(Clone)]
pub struct Terminal(Rc<RefCell<Cooked>>);

struct Cooked {
    keys: pipe::Reader,
    screen: pipe::Writer,
    editor: LineEditor,
    line: Vec<u8>,
    at: usize,
    /// Echo that found no room yet.
    echo: Vec<u8>,
    ended: bool,
}

impl Terminal {
    /// Reads keys, echoes to the screen.
    pub fn new(keys: pipe::Reader, screen: pipe::Writer, columns: u32) -> Self {
        Self(Rc::new(RefCell::new(Cooked {
            keys,
            screen,
            editor: LineEditor::new(columns),
            line: Vec::new(),
            at: 0,
            echo: Vec::new(),
            ended: false,
        })))
    }
}

impl Cooked {
    fn poll_read(&mut self, context: &Context<'_>, into: &mut [u8]) -> Poll<usize> {
        let Some(there) = ready!(self.poll_line(context)) else { return Poll::Ready(0) };
        let count = there.min(into.len());
        into[..count].copy_from_slice(&self.line[self.at..self.at + count]);
        self.at += count;
        Poll::Ready(count)
    }

    /// Ready with what is left of a line, or with nothing at the end.
    fn poll_line(&mut self, context: &Context<'_>) -> Poll<Option<usize>> {
        loop {
            while !self.echo.is_empty() {
                match self.screen.poll_write(context, &self.echo) {
                    Poll::Ready(Ok(count)) => drop(self.echo.drain(..count)),
                    Poll::Ready(Err(pipe::Broken)) => self.echo.clear(),
                    Poll::Pending => return Poll::Pending,
                }
            }
            if self.at < self.line.len() {
                return Poll::Ready(Some(self.line.len() - self.at));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let editor = &mut self.editor;
            let Poll::Ready(taken) = self.keys.poll_take(context, |bytes| editor.input(bytes)) else {
                return Poll::Pending;
            };
            match taken {
                Some(Some(line::Input::Line(line))) => {
                    self.line = line.into_bytes();
                    self.line.push(b'\n');
                    self.at = 0;
                    self.editor.prompt("");
                }
                Some(Some(line::Input::End)) | None => self.ended = true,
                Some(Some(line::Input::Interrupt) | None) => {}
            }
            self.echo.extend_from_slice(self.editor.take_echo().as_bytes());
        }
    }
}
