//! What a command reads and writes: pipes, the terminal, files.

use alloc::{rc::Rc, string::String, vec::Vec};
use core::{
    cell::RefCell,
    future::poll_fn,
    task::{Context, Poll},
};

use kage_ssh::line::{self, LineEditor, for_terminal};

use super::{Failure, pipe};
use crate::files;

/// Where a command's input comes from.
#[derive(Clone)]
pub enum Input {
    /// A pipe, perhaps to the user.
    Pipe(pipe::Reader),
    /// The user's keyboard.
    Terminal(Terminal),
    /// A file, from an offset on.
    File {
        /// Its path.
        path: String,
        /// The next byte.
        offset: usize,
    },
}

impl Input {
    /// Reads; 0 at the end.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub async fn read(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        match self {
            Self::Pipe(reader) => Ok(reader.read(into).await),
            Self::Terminal(terminal) => Ok(terminal.read(into).await),
            Self::File { path, offset } => {
                let count =
                    files::read(path, *offset, into).map_err(|error| Failure::File(path.clone(), error))?;
                *offset += count;
                Ok(count)
            }
        }
    }
}

/// Where a command's output goes.
#[derive(Clone)]
pub enum Output {
    /// A pipe, perhaps to the user.
    Pipe(pipe::Writer),
    /// A terminal, which wants a carriage return before each line feed.
    Terminal(pipe::Writer),
    /// The end of a file.
    File(String),
}

impl Output {
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
            Self::File(path) => {
                files::append(path, bytes).map_err(|error| Failure::File(path.clone(), error))
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
