//! The third party over TCP, for `ReqwestService`.

use std::io;
use std::sync::{Arc, Mutex};

use http::Request;
use http_body_util::{BodyExt, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;
use tower::filter::{FilterLayer, Predicate};
use tower::util::BoxCloneService;
use tower_idempotency::client::ReqwestService;

use super::party::{Head, Log, location};
use super::plan::{BODY, Event, Plan};
use super::stack::Client;

use crate::support::Broken;

/// The history that the hosts act out now.
pub(super) type Current = Arc<Mutex<Option<Script>>>;

#[derive(Clone)]
pub(super) struct Script {
    plan: Plan,
    log: Log,
    home: String,
    other: String,
}

impl Script {
    pub(super) fn new(plan: &Plan, log: &Log, hosts: &Hosts) -> Self {
        Self {
            plan: plan.clone(),
            log: log.clone(),
            home: hosts.home.clone(),
            other: hosts.other.clone(),
        }
    }
}

pub(super) struct Hosts {
    pub(super) home: String,
    pub(super) other: String,
    service: ReqwestService,
}

impl Hosts {
    pub(super) async fn start(current: &Current) -> Self {
        let (home, other) = (serve(current).await, serve(current).await);
        let connector = FilterLayer::new(Connector(Arc::clone(current)));
        let builder = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .no_proxy()
            .connector_layer(connector);
        Self {
            home,
            other,
            service: ReqwestService::build(builder).unwrap(),
        }
    }

    pub(super) fn transport(&self) -> Client<reqwest::Error> {
        let service = self.service.clone();
        let service = service.map_request(|request: Request<Full<bytes::Bytes>>| {
            let (head, body) = request.into_parts();
            let bytes = futures::FutureExt::now_or_never(body.collect()).unwrap().unwrap();
            Request::from_parts(head, reqwest::Body::from(bytes.to_bytes()))
        });
        BoxCloneService::new(
            service.map_response(|response| response.map(|body| body.map_err(|_| Broken).boxed_unsync())),
        )
    }
}

/// Lets a connection fail if the plan says so.
#[derive(Clone)]
struct Connector(Current);

impl<T> Predicate<T> for Connector {
    type Request = T;

    fn check(&mut self, target: T) -> Result<T, tower::BoxError> {
        let script = self.0.lock().unwrap().clone().unwrap();
        let step = script.log.next(&script.plan);
        if step.event == Event::NotConnected {
            script.log.hop(step, None);
            return Err("no connection".into());
        }
        Ok(target)
    }
}

async fn serve(current: &Current) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap());
    let (current, own) = (Arc::clone(current), origin.clone());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let script = current.lock().unwrap().clone().unwrap();
            // The client may have left.
            drop(act(&script, &own, stream).await);
        }
    });
    origin
}

/// Reads a request whole, so that the end of the connection does not reset it, and responds.
async fn act(script: &Script, origin: &str, mut stream: TcpStream) -> io::Result<()> {
    let step = script.log.next(&script.plan);
    if step.event == Event::ResetBefore {
        script.log.hop(step, None);
        return Ok(());
    }
    let head = read_head(&mut stream, origin).await?;
    script.log.hop(step, Some(head));
    let (status, fields, is_broken) = match step.event {
        Event::NotConnected | Event::ResetBefore | Event::ResetAfter | Event::TimedOut => return Ok(()),
        Event::Respond {
            status,
            retry_after,
            is_broken,
        } => {
            let field = retry_after.map(|seconds| format!("retry-after: {seconds}\r\n"));
            (status, field.unwrap_or_default(), is_broken)
        }
        Event::Redirect { status, to } => {
            let location = location(to, &script.home, &script.other);
            (status, format!("location: {location}\r\n"), false)
        }
    };
    let body = if is_broken { "o" } else { "ok" };
    let response = format!("HTTP/1.1 {status} Status\r\n{fields}content-length: 2\r\nconnection: close\r\n\r\n{body}");
    stream.write_all(response.as_bytes()).await
}

async fn read_head(stream: &mut TcpStream, origin: &str) -> io::Result<Head> {
    let mut bytes = Vec::new();

    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") || !bytes.ends_with(BODY.as_bytes()) {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let text = String::from_utf8(bytes).unwrap();
    let key = text.lines().find_map(|line| line.strip_prefix("idempotency-key: "));
    Ok(Head {
        origin: origin.to_owned(),
        key: key.map(str::to_owned),
    })
}
