//! What a command reads and writes: pipes, the terminal, files.

use alloc::{rc::Rc, string::String, vec::Vec};
use core::{
    cell::RefCell,
    future::poll_fn,
    task::{Context, Poll},
};

use kage_ssh::line::{self, LineEditor, for_terminal};

use super::{Failure, pipe};
use crate::fs::{self, FileError, Kind, OpenFile, OpenOptions};

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
        match self {
            Self::Pipe(reader) => Ok(reader.read(into).await),
            Self::Terminal(terminal) => Ok(terminal.read(into).await),
            Self::File(named) => named.file.read(into).map_err(|error| named.failure(error)),
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
        match self {
            Self::Pipe(writer) => writer.write_all(bytes).await.map_err(|pipe::Broken| Failure::Broken),
            Self::Terminal(writer) => {
                writer.write_all(&for_terminal(bytes)).await.map_err(|pipe::Broken| Failure::Broken)
            }
            Self::File(named) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let count = named.file.write(rest).map_err(|error| named.failure(error))?;
                    rest = &rest[count..];
                }
                Ok(())
            }
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

    async fn read(&self, into: &mut [u8]) -> usize {
        poll_fn(|context| self.0.borrow_mut().poll_read(context, into)).await
    }
}

impl Cooked {
    fn poll_read(&mut self, context: &Context<'_>, into: &mut [u8]) -> Poll<usize> {
        loop {
            while !self.echo.is_empty() {
                match self.screen.poll_write(context, &self.echo) {
                    Poll::Ready(Ok(count)) => drop(self.echo.drain(..count)),
                    Poll::Ready(Err(pipe::Broken)) => self.echo.clear(),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let ready = &self.line[self.at..];
            if !ready.is_empty() {
                let count = ready.len().min(into.len());
                into[..count].copy_from_slice(&ready[..count]);
                self.at += count;
                return Poll::Ready(count);
            }
            if self.ended {
                return Poll::Ready(0);
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
