//! The guest's pure parts, compiled for the host: what strangers and users type never harms them.

extern crate alloc;

#[path = "../../guest/src/shell/parse.rs"]
mod parse;
#[path = "../../guest/src/service/http/request.rs"]
#[expect(dead_code, reason = "the guest uses more of it than these tests do")]
mod request;

use parse::{ParseError, Piece, Redirect, When};
use proptest::prelude::*;
use request::{Bad, Wanted};

fn text(word: &str) -> parse::Word {
    vec![Piece::Text(word.into())]
}

#[test]
fn a_line_is_pipelines_commands_words_and_redirections() {
    let list =
        parse::parse("sum <a>b | cat >> 'c d' 2>&1 && echo \"$USER's $?\" || false; ~/x # rest").unwrap();
    let whens: Vec<When> = list.iter().map(|(when, _)| *when).collect();
    assert_eq!(whens, [When::Always, When::Success, When::Failure, When::Always]);
    let first = &list[0].1;
    assert_eq!(first[0].words, [text("sum")]);
    assert_eq!(first[0].redirects, [Redirect::Input(text("a")), Redirect::Output(text("b"), false)]);
    assert_eq!(first[1].redirects, [Redirect::Output(text("c d"), true), Redirect::ErrorToOutput]);
    let echo = &list[1].1[0].words[1];
    assert!(echo.contains(&Piece::User) && echo.contains(&Piece::Status), "{echo:?}");
    assert_eq!(list[3].1[0].words[0], [Piece::Home, Piece::Text("/x".into())]);
    assert_eq!(parse::parse("  # nothing").unwrap(), []);
    assert_eq!(parse::parse("echo ''").unwrap()[0].1[0].words.len(), 2);
}

#[test]
fn half_a_line_is_refused() {
    for (line, error) in [
        ("echo 'x", ParseError::Quote),
        ("echo \"x", ParseError::Quote),
        ("echo \\", ParseError::Quote),
        ("echo >", ParseError::Operator),
        ("| cat", ParseError::Operator),
        ("cat |", ParseError::Operator),
        ("cat &&", ParseError::Operator),
        ("; echo", ParseError::Operator),
        ("cat < | cat", ParseError::Operator),
    ] {
        assert_eq!(parse::parse(line), Err(error), "{line}");
    }
    assert_eq!(parse::parse(&"x ".repeat(600)), Err(ParseError::TooLong));
}

fn wanted(lines: &str) -> Result<Wanted, Bad> {
    request::parse(lines.as_bytes()).and_then(|request| request.wanted)
}

#[test]
fn requests_are_read_and_others_refused() {
    assert_eq!(wanted("GET / HTTP/1.1\r\nHost: x"), Ok(Wanted::State));
    let stream = Wanted::Stream { bytes: 5, seed: 7 };
    assert_eq!(wanted("HEAD /stream?bytes=5&seed=7 HTTP/1.0"), Ok(stream));
    assert_eq!(wanted("GET http://[fd00::1]:80/stream?seed=7&bytes=5 HTTP/1.1"), Ok(stream));
    assert_eq!(wanted("GET http://host HTTP/1.1"), Ok(Wanted::State));
    for (lines, bad) in [
        ("", Bad::Request),
        ("GET /", Bad::Request),
        ("GET  / HTTP/1.1", Bad::Request),
        ("G@T / HTTP/1.1", Bad::Request),
        ("GET / HTTP/1.1\r\nno colon", Bad::Request),
        ("GET / HTTP/1.1\r\nName : x", Bad::Request),
        ("GET / HTTP/2.0", Bad::Version),
        ("POST / HTTP/1.1", Bad::Method),
        ("POST / HTTP/1.1\r\nContent-Length: 5", Bad::TooLarge),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked", Bad::TooLarge),
        ("GET /x HTTP/1.1", Bad::Path),
        ("GET /stream?bytes=-1 HTTP/1.1", Bad::Query),
        ("GET /stream?bytes=99999999999999999 HTTP/1.1", Bad::Query),
        ("GET /stream?what=1 HTTP/1.1", Bad::Query),
    ] {
        assert_eq!(wanted(lines), Err(bad), "{lines:?}");
    }
    let keeps = |lines: &str| request::parse(lines.as_bytes()).unwrap().keep;
    assert!(keeps("GET / HTTP/1.1") && !keeps("GET / HTTP/1.0"));
    assert!(
        !keeps("GET / HTTP/1.1\r\nConnection: x, Close") && keeps("GET / HTTP/1.0\r\nConnection: Keep-Alive")
    );
}

proptest! {
    #[test]
    fn no_line_harms_the_shell(line in "[ -~'\"\\\\|&;<>$~#é\t]{0,200}") {
        let _ = parse::parse(&line);
    }

    #[test]
    fn no_bytes_harm_the_http_server(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = request::parse(&bytes);
    }

    #[test]
    fn no_request_line_harms_the_http_server(line in "(GET|HEAD|X) /?(stream)?[?&=a-z0-9/:]{0,40} HTTP/1.[01](\r\n[a-z:, -]{0,20}){0,3}") {
        let _ = request::parse(line.as_bytes());
    }
}
