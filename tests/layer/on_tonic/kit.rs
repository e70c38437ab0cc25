//! A gRPC service whose messages are bytes, so that the tests need no generated code, and its
//! client.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use futures::Stream;
use futures::future::BoxFuture;
use http::uri::PathAndQuery;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::NamedService;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};
use tower::{Service, service_fn};
use tower_idempotency::{IdempotencyLayer, Store};

pub(crate) const CHARGE: &str = "/test.Payments/Charge";
pub(crate) const WATCH: &str = "/test.Payments/Watch";

/// A codec that passes messages on unchanged.
#[derive(Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

pub(crate) type Unary = Result<Response<Bytes>, Status>;
pub(crate) type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;
type Charge = Arc<dyn Fn(usize, Request<Bytes>) -> BoxFuture<'static, Unary> + Send + Sync>;
type Watch = Arc<dyn Fn(usize) -> Messages + Send + Sync>;

/// The service `test.Payments` with one unary method and one streaming method. Each handler gets
/// the number of its run, which begins with 1.
#[derive(Clone)]
pub(crate) struct Payments {
    runs: Arc<AtomicUsize>,
    charge: Charge,
    watch: Watch,
}

impl Payments {
    pub(crate) fn new() -> Self {
        Self {
            runs: Arc::default(),
            charge: Arc::new(|run, _| Box::pin(async move { Ok(Response::new(format!("charge {run}").into())) })),
            watch: Arc::new(|run| Box::pin(tokio_stream::iter([Ok(format!("watch {run}").into())]))),
        }
    }

    pub(crate) fn charging<F>(mut self, charge: impl Fn(usize, Request<Bytes>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Unary> + Send + 'static,
    {
        self.charge = Arc::new(move |run, request| Box::pin(charge(run, request)));
        self
    }

    pub(crate) fn watching<M>(mut self, watch: impl Fn(usize) -> M + Send + Sync + 'static) -> Self
    where
        M: Stream<Item = Result<Bytes, Status>> + Send + 'static,
    {
        self.watch = Arc::new(move |run| Box::pin(watch(run)));
        self
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }
}

impl NamedService for Payments {
    const NAME: &'static str = "test.Payments";
}

impl Service<http::Request<Body>> for Payments {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Raw);
            for encoding in [
                CompressionEncoding::Gzip,
                CompressionEncoding::Deflate,
                CompressionEncoding::Zstd,
            ] {
                grpc = grpc.accept_compressed(encoding).send_compressed(encoding);
            }
            let run = this.runs.fetch_add(1, Ordering::SeqCst) + 1;
            let is_charge = request.uri().path() == CHARGE;
            Ok(if is_charge {
                grpc.unary(service_fn(|request| (this.charge)(run, request)), request)
                    .await
            } else {
                let messages = || std::future::ready(Ok(Response::new((this.watch)(run))));
                grpc.server_streaming(service_fn(|_: Request<Bytes>| messages()), request)
                    .await
            })
        })
    }
}

/// Serves on a free port until the test ends. The layer is directly around the services of tonic.
pub(crate) async fn serve<St: Store>(layer: IdempotencyLayer<St>, payments: Payments) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().layer(layer).add_service(payments);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

/// A client with the encodings that it sends and reads.
#[derive(Clone)]
pub(crate) struct Client(tonic::client::Grpc<Channel>);

impl Client {
    pub(crate) async fn of(address: SocketAddr) -> Self {
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .connect()
            .await
            .unwrap();
        Self(tonic::client::Grpc::new(channel))
    }

    pub(crate) fn sending(self, encoding: CompressionEncoding) -> Self {
        Self(self.0.send_compressed(encoding))
    }

    pub(crate) fn reading(self, encoding: CompressionEncoding) -> Self {
        Self(self.0.accept_compressed(encoding))
    }

    pub(crate) async fn charge(&self, request: Request<Bytes>) -> Unary {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        grpc.unary(request, PathAndQuery::from_static(CHARGE), Raw).await
    }

    pub(crate) async fn watch(&self, request: Request<Bytes>) -> Result<Response<tonic::Streaming<Bytes>>, Status> {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        grpc.server_streaming(request, PathAndQuery::from_static(WATCH), Raw)
            .await
    }
}

/// Returns a request with a key.
pub(crate) fn with_key(key: &str, message: &'static str) -> Request<Bytes> {
    let mut request = Request::new(Bytes::from_static(message.as_bytes()));
    request.metadata_mut().insert("idempotency-key", key.parse().unwrap());
    request
}

pub(crate) fn is_replay(metadata: &tonic::metadata::MetadataMap) -> bool {
    metadata.get("idempotent-replayed").is_some_and(|mark| mark == "true")
}

/// Waits until the condition is true, or panics.
pub(crate) async fn until(is_true: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if is_true() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the condition stays false");
}
