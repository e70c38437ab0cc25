//! hyper without a framework: the layer wraps a plain function, over HTTP/1 and HTTP/2.
//!
//! ```text
//! cargo run --example bare_hyper
//! curl -i http://127.0.0.1:3000/ -H 'Idempotency-Key: 1' -d 'two teapots'
//! ```
//!
//! Send the request again: the order has the same number. Ctrl-C makes the server refuse new
//! connections, finish the open requests, and wait for the executions whose callers hung up.
//! `LISTEN` sets another address.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tower::{Service, ServiceBuilder};
use tower_http::map_request_body::MapRequestBodyLayer;
use tower_idempotency::{BufferedBody, Drain, IdempotencyLayer, MemoryStore};

/// Takes an order. This lasts one second.
async fn order(request: Request<BufferedBody<Incoming>>) -> Result<Response<Full<Bytes>>, Infallible> {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let Ok(body) = request.into_body().collect().await else {
        let problem = "the body of the order broke off\n";
        return Ok(respond(StatusCode::BAD_REQUEST, problem.to_owned()));
    };
    let n = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    println!("order {n} begins");
    tokio::time::sleep(Duration::from_secs(1)).await;
    println!("order {n} is taken");
    let what = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    Ok(respond(StatusCode::CREATED, format!("order {n}: {what}\n")))
}

fn respond(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

/// Accepts connections until Ctrl-C, and then serves the open ones until they end.
async fn serve<S>(listener: TcpListener, service: S) -> io::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<Full<Bytes>>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let connections = GracefulShutdown::new();
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => connect(&connections, stream, service.clone()),
                Err(error) => eprintln!("cannot accept a connection: {error}"),
            },
            signal = &mut interrupted => {
                drop(listener);
                connections.shutdown().await;
                return signal;
            }
        }
    }
}

fn connect<S>(connections: &GracefulShutdown, stream: TcpStream, service: S)
where
    S: Service<Request<Incoming>, Response = Response<Full<Bytes>>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let server = auto::Builder::new(TokioExecutor::new());
    let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let connection = connections.watch(connection.into_owned());
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("a connection broke off: {error}");
        }
    });
}

/// Waits up to 30 s for the executions whose callers hung up, so that their effects and responses
/// are complete before the process ends.
async fn finish(drain: Drain) {
    match tokio::time::timeout(Duration::from_secs(30), drain.wait()).await {
        Ok(()) => println!("everything is finished"),
        Err(_) => eprintln!("{} executions did not finish within 30 s", drain.running()),
    }
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let drain = idempotency.drain();
    // The layer reads the bodies of guarded requests and passes the bytes on as a `BufferedBody`.
    // The outer layer wraps each body in this type.
    let service = ServiceBuilder::new()
        .layer(MapRequestBodyLayer::new(BufferedBody::new))
        .layer(idempotency)
        .service_fn(order);

    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    serve(listener, service).await?;
    finish(drain).await;
    Ok(())
}
