//! Command lines: words, quotes, variables, `;` `&` `&&` `||` `|`, redirections.
//!
//! Grammar, a small part of POSIX 2.10:
//! ```text
//! list     = [ pipeline { (";" | "&" | "&&" | "||") pipeline } [ ";" | "&" ] ]
//! pipeline = command { "|" command }
//! command  = { word | ("<" | ">" | ">>" | "2>" | "2>>") word | "2>&1" }
//! ```
//! `'…'` quotes everything, `"…"` all but `\` and `$`; `$?`, `$NAME` and `${NAME}` are replaced when a command runs.
//! `&` puts the pipeline before it into the background. Not here: globs, subshells.

use alloc::{string::String, vec::Vec};
use core::fmt;

/// Most words and operators in a line.
const MAX_TOKENS: usize = 512;

/// Why a line is no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// A quote is not closed.
    Quote,
    /// An operator without its command or file name.
    Operator,
    /// Too many words.
    TooLong,
}

impl fmt::Display for ParseError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Quote => "a quote is not closed",
            Self::Operator => "an operator lacks its command or file",
            Self::TooLong => "too many words",
        })
    }
}

/// Part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text as it is.
    Text(String),
    /// `$?`.
    Status,
    /// `$NAME` or `${NAME}`.
    Variable(String),
    /// `~` at a word's start.
    Home,
}

/// A word.
pub type Word = Vec<Piece>;

/// Where a redirection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// `<`.
    Input(Word),
    /// `>`, or `>>` to append.
    Output(Word, bool),
    /// `2>`, or `2>>` to append.
    Error(Word, bool),
    /// `2>&1`.
    ErrorToOutput,
}

/// One command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Name and arguments.
    pub words: Vec<Word>,
    /// In order.
    pub redirects: Vec<Redirect>,
}

/// When a pipeline runs, given the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// After success.
    Success,
    /// After failure.
    Failure,
}

/// Commands joined by pipes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pipeline {
    /// When it runs.
    pub when: When,
    /// Nobody waits for it.
    pub background: bool,
    /// In order.
    pub commands: Vec<Command>,
}

/// Pipelines in order.
pub type List = Vec<Pipeline>;

enum Token {
    Word(Word),
    Operator(&'static str),
}

/// Parses a line; an empty one, or a comment, gives an empty list.
///
/// # Errors
/// [`ParseError`].
pub fn parse(line: &str) -> Result<List, ParseError> {
    let tokens = tokens(line)?;
    let mut list = List::new();
    let mut pipeline = Vec::new();
    let mut command = Command::default();
    let mut when = When::Always;
    let mut tokens = tokens.into_iter().peekable();
    let is_empty = |command: &Command| command.words.is_empty() && command.redirects.is_empty();
    while let Some(token) = tokens.next() {
        let operator = match token {
            Token::Word(word) => {
                command.words.push(word);
                continue;
            }
            Token::Operator(operator) => operator,
        };
        let redirect: Option<fn(Word) -> Redirect> = match operator {
            "<" => Some(Redirect::Input),
            ">" => Some(|word| Redirect::Output(word, false)),
            ">>" => Some(|word| Redirect::Output(word, true)),
            "2>" => Some(|word| Redirect::Error(word, false)),
            "2>>" => Some(|word| Redirect::Error(word, true)),
            _ => None,
        };
        if let Some(redirect) = redirect {
            let Some(Token::Word(word)) = tokens.next() else { return Err(ParseError::Operator) };
            command.redirects.push(redirect(word));
            continue;
        }
        if operator == "2>&1" {
            command.redirects.push(Redirect::ErrorToOutput);
            continue;
        }
        if is_empty(&command) {
            return Err(ParseError::Operator);
        }
        pipeline.push(core::mem::take(&mut command));
        if operator == "|" {
            if tokens.peek().is_none() {
                return Err(ParseError::Operator);
            }
            continue;
        }
        let commands = core::mem::take(&mut pipeline);
        list.push(Pipeline { when, background: operator == "&", commands });
        when = match operator {
            "&&" => When::Success,
            "||" => When::Failure,
            _ => When::Always,
        };
        if when != When::Always && tokens.peek().is_none() {
            return Err(ParseError::Operator);
        }
    }
    if !is_empty(&command) {
        pipeline.push(command);
    }
    if !pipeline.is_empty() {
        list.push(Pipeline { when, background: false, commands: pipeline });
    }
    Ok(list)
}

/// Operators, the longer before those they start with.
const OPERATORS: [&str; 11] = ["2>&1", "2>>", "2>", "&&", "||", ">>", ">", "<", "|", ";", "&"];

fn tokens(line: &str) -> Result<Vec<Token>, ParseError> {
    let mut tokens = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_start();
        if rest.is_empty() || rest.starts_with('#') {
            return Ok(tokens);
        }
        if tokens.len() >= MAX_TOKENS {
            return Err(ParseError::TooLong);
        }
        if let Some(operator) = OPERATORS.into_iter().find(|operator| rest.starts_with(operator)) {
            tokens.push(Token::Operator(operator));
            rest = &rest[operator.len()..];
            continue;
        }
        let (word, after) = word(rest)?;
        tokens.push(Token::Word(word));
        rest = after;
    }
}

/// Reads one word off the front of `text`.
fn word(text: &str) -> Result<(Word, &str), ParseError> {
    let mut word = Word::new();
    let mut plain = String::new();
    let mut rest = text;
    let mut quoted = false;
    if let Some(after) =
        rest.strip_prefix('~').filter(|after| after.is_empty() || after.starts_with(['/', ' ']))
    {
        word.push(Piece::Home);
        rest = after;
    }
    while let Some(character) = rest.chars().next() {
        let after = &rest[character.len_utf8()..];
        match character {
            '\'' if !quoted => {
                let (inside, after) = after.split_once('\'').ok_or(ParseError::Quote)?;
                plain.push_str(inside);
                if inside.is_empty() && plain.is_empty() {
                    word.push(Piece::Text(String::new()));
                }
                rest = after;
            }
            '"' => {
                quoted = !quoted;
                if plain.is_empty() {
                    word.push(Piece::Text(String::new()));
                }
                rest = after;
            }
            '\\' => {
                let escaped = after.chars().next().ok_or(ParseError::Quote)?;
                if quoted && !matches!(escaped, '"' | '\\' | '$') {
                    plain.push('\\');
                }
                plain.push(escaped);
                rest = &after[escaped.len_utf8()..];
            }
            '$' => match variable(after) {
                Some((piece, after)) => {
                    if !plain.is_empty() {
                        word.push(Piece::Text(core::mem::take(&mut plain)));
                    }
                    word.push(piece);
                    rest = after;
                }
                None => {
                    plain.push('$');
                    rest = after;
                }
            },
            _ if !quoted
                && (character.is_whitespace() || matches!(character, ';' | '|' | '<' | '>' | '&')) =>
            {
                break;
            }
            _ => {
                plain.push(character);
                rest = after;
            }
        }
    }
    if quoted {
        return Err(ParseError::Quote);
    }
    if !plain.is_empty() {
        word.push(Piece::Text(plain));
    }
    Ok((word, rest))
}

/// Whether a variable may be called so.
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|first: char| first.is_ascii_digit())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
}

/// Reads what stands behind a `$`; `None` if that is no variable.
fn variable(text: &str) -> Option<(Piece, &str)> {
    if let Some(rest) = text.strip_prefix('?') {
        return Some((Piece::Status, rest));
    }
    if let Some(rest) = text.strip_prefix('{') {
        let (name, rest) = rest.split_once('}')?;
        return is_name(name).then(|| (Piece::Variable(name.into()), rest));
    }
    let end = text.find(|character: char| !character.is_ascii_alphanumeric() && character != '_');
    let (name, rest) = text.split_at(end.unwrap_or(text.len()));
    is_name(name).then(|| (Piece::Variable(name.into()), rest))
}
