//! A small HTTP/1.1 client: one request over a unix socket or over TLS, JSON in and out.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::api::error::{Code, ErrorBody};

/// Largest answer taken.
const MAX_BODY: usize = 16 << 20;

/// A request to a daemon.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its method.
    pub method: Method,
    /// Path with query.
    pub path: String,
    /// JSON, bytes, or nothing.
    pub body: Bytes,
    /// What the body is.
    pub content: &'static str,
    /// Whether it changes nothing, so that it may be asked twice.
    pub repeatable: bool,
    /// How long the whole may take.
    pub patience: Duration,
    /// Hosts it went through; guards against going in circles.
    pub hops: u8,
}

/// Carries [`Call::hops`].
pub const HOPS: &str = "x-kage-hops";

impl Call {
    /// A request without a body.
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        let repeatable = method == Method::GET;
        Self {
            method,
            path: path.into(),
            body: Bytes::new(),
            content: "application/json",
            repeatable,
            patience: Duration::from_secs(30),
            hops: 0,
        }
    }

    /// With bytes as its body, to be read and nothing else.
    #[must_use]
    pub fn bytes(mut self, bytes: Vec<u8>) -> Self {
        (self.body, self.content, self.repeatable) = (bytes.into(), "application/octet-stream", true);
        self
    }

    /// With a JSON body.
    #[must_use]
    pub fn json(mut self, body: &impl Serialize) -> Self {
        // Types of the API have string keys only, so that they always are JSON.
        self.body = serde_json::to_vec(body).unwrap_or_default().into();
        self
    }

    /// With another patience.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    fn request(&self) -> Result<Request<Full<Bytes>>, ErrorBody> {
        Request::builder()
            .method(self.method.clone())
            .uri(&self.path)
            .header(header::HOST, "kage")
            .header(header::CONTENT_TYPE, self.content)
            .header(HOPS, self.hops.to_string())
            .body(Full::new(self.body.clone()))
            .map_err(|error| ErrorBody::bad_request(format!("{}: {error}", self.path)))
    }
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The body as a value of the API, or the error it carries.
    ///
    /// # Errors
    /// What the daemon says, or that it speaks something else.
    pub fn into_value<T: DeserializeOwned>(self) -> Result<T, ErrorBody> {
        let garbled = |error: serde_json::Error| {
            let text = String::from_utf8_lossy(&self.body).chars().take(120).collect::<String>();
            ErrorBody::failed(format!(
                "the daemon's answer ({}) is not understood: {error}: {text}",
                self.status
            ))
        };
        if self.status.is_success() {
            serde_json::from_slice(&self.body).map_err(garbled)
        } else {
            Err(self.into_error())
        }
    }

    /// The error that an answer carries which is no success.
    #[must_use]
    pub fn into_error(self) -> ErrorBody {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| {
            ErrorBody::failed(format!("the daemon's answer ({}) is not understood", self.status))
        })
    }
}

/// A connection that can carry one request after another.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Speaks HTTP over a stream.
    ///
    /// # Errors
    /// When the stream ends.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Self, hyper::Error> {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an HTTP connection ended");
            }
        });
        Ok(Self { sender })
    }

    /// Whether it can still carry requests, as far as is known.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Sends a request and returns the answer's head; the body is read by the caller.
    ///
    /// # Errors
    /// [`ErrorBody`] with [`Code::Unreachable`] when the connection ends.
    pub async fn open(&mut self, call: &Call) -> Result<http::Response<Incoming>, ErrorBody> {
        let gone =
            |error: hyper::Error| ErrorBody::new(Code::Unreachable, format!("the connection ended: {error}"));
        self.sender.ready().await.map_err(gone)?;
        self.sender.send_request(call.request()?).await.map_err(gone)
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// [`Code::Unreachable`], [`Code::TimedOut`].
    pub async fn call(&mut self, call: &Call) -> Result<Answer, ErrorBody> {
        let work = async {
            let response = self.open(call).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(|error| {
                ErrorBody::new(Code::Unreachable, format!("the answer broke off: {error}"))
            })?;
            Ok(Answer { status, body: body.to_bytes() })
        };
        tokio::time::timeout(call.patience, work).await.unwrap_or_else(|_| {
            Err(ErrorBody::new(
                Code::TimedOut,
                format!("{} {} had no answer in {:?}", call.method, call.path, call.patience),
            ))
        })
    }
}

/// Connects to a daemon's unix socket.
///
/// # Errors
/// [`Code::Unreachable`] with the cure.
pub async fn unix(path: &Path) -> Result<Connection, ErrorBody> {
    let down = |cause: String| {
        let message = format!(
            "no daemon answers at {}: {cause}; start one with `kage host -c host.toml`",
            path.display()
        );
        ErrorBody::new(Code::Unreachable, message)
    };
    let stream = tokio::net::UnixStream::connect(path).await.map_err(|error| down(error.to_string()))?;
    Connection::over(stream).await.map_err(|error| down(error.to_string()))
}
