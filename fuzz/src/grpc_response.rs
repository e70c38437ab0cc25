//! The status, the trailers and the compression of a gRPC response.
//!
//! The layer stores a response if, and only if, its statuses agree on one by which the handler has
//! decided the call. A client that accepts the encoding gets the stored bytes and the trailers. Any
//! other client gets the plain form of the messages, or a refusal if there is no such form.

use bytes::Bytes;
use futures::executor::block_on;
use futures::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tower_idempotency::protocol::{Decision, Fence, Grant, Nonce, Outcome, Owner, StoredResponse};
use tower_idempotency::{Refusal, RefusalKind};

use crate::exchange::{AnyBody, layer, refused, stored};
use crate::grpc::{ENCODINGS, LIMIT, plain};
use crate::input::Input;

/// The codes of `OK`, `INVALID_ARGUMENT`, `NOT_FOUND`, `ALREADY_EXISTS`, `FAILED_PRECONDITION` and
/// `OUT_OF_RANGE`.
const DECIDED: [&str; 6] = ["0", "3", "5", "6", "9", "11"];

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let encoding = ENCODINGS[usize::from(input.byte() % 4)];
    let [in_head, in_trailers] = [(); 2].map(|()| {
        let length = usize::from(input.byte());
        HeaderValue::from_bytes(input.part(length)).ok()
    });
    let body = input.rest();
    if body.len() > LIMIT {
        return;
    }
    let grant = Grant {
        owner: Owner {
            nonce: Nonce::from_bytes([9; 16]),
            fence: Fence::new(1),
        },
        attempt: 1,
        lease: None,
    };
    let execute = layer(Ok(Decision::Execute(grant))).grpc();
    let response = response(encoding, in_head.as_ref(), in_trailers.as_ref(), body);
    let (outcome, first) = stored(&execute, request(encoding), response);
    let first = collected(first);
    assert_eq!(first.body, body);
    let statuses: Vec<_> = [&in_head, &in_trailers].into_iter().flatten().collect();
    let is_decided = statuses.first().is_some_and(|first| {
        DECIDED.contains(&first.to_str().unwrap_or("")) && statuses.iter().all(|status| status == first)
    });
    let stored = match outcome {
        Some(Outcome::Stored(stored)) => Some(stored),
        None => None,
        other => panic!("{other:?}"),
    };
    assert_eq!(stored.is_some(), is_decided, "{statuses:?}");
    if let Some(stored) = stored {
        check_replays(encoding, body, &first, &stored);
    }
}

fn check_replays(encoding: &str, body: &[u8], first: &Replay, stored: &StoredResponse) {
    let replay = layer(Ok(Decision::Replay(stored.clone()))).grpc();
    let replayed = collected(refused(&replay, request(encoding)).1);
    for name in ["content-type", "grpc-encoding", "grpc-status"] {
        assert_eq!(replayed.head.get(name), first.head.get(name));
    }
    assert_eq!(
        (replayed.trailers, replayed.body),
        (first.trailers.clone(), first.body.clone())
    );

    let (_, response) = refused(&replay, request("br"));
    let refusal = response.extensions().get::<Refusal>().map(Refusal::kind);
    let adapted = collected(response).body;
    match (plain(encoding, body), encoding) {
        // The bytes of such a response are for every client.
        (_, "identity") => assert_eq!((refusal, &adapted[..]), (None, body)),
        // Only the crate itself reads `zstd` here.
        (_, "zstd") => assert!(matches!(refusal, None | Some(RefusalKind::EncodingNotAccepted))),
        (Some(plain), _) => assert_eq!((refusal, &adapted[..]), (None, &plain[..])),
        // The limit of the layer is higher than the limit of the model.
        (None, _) if refusal.is_none() => assert!(adapted.len() > LIMIT),
        (None, _) => assert_eq!(refusal, Some(RefusalKind::EncodingNotAccepted)),
    }
}

fn request(accepted: &str) -> Request<Bytes> {
    let request = Request::post("/bank/Pay").header("idempotency-key", "k");
    let request = request
        .header("content-type", "application/grpc")
        .header("grpc-accept-encoding", accepted);
    request.body(Bytes::new()).unwrap()
}

fn response(
    encoding: &str,
    in_head: Option<&HeaderValue>,
    in_trailers: Option<&HeaderValue>,
    body: &[u8],
) -> Response<AnyBody> {
    let mut frames = vec![Ok(Frame::data(Bytes::copy_from_slice(body)))];
    if let Some(status) = in_trailers {
        let trailers = [("grpc-status".parse().unwrap(), status.clone())];
        frames.push(Ok(Frame::trailers(HeaderMap::from_iter(trailers))));
    }
    let mut response = Response::builder()
        .header("content-type", "application/grpc")
        .header("grpc-encoding", encoding);
    if let Some(status) = in_head {
        response = response.header("grpc-status", status);
    }
    response
        .body(StreamBody::new(stream::iter(frames)).boxed_unsync())
        .unwrap()
}

struct Replay {
    head: HeaderMap,
    trailers: Option<HeaderMap>,
    body: Bytes,
}

fn collected(response: Response<AnyBody>) -> Replay {
    let (head, body) = response.into_parts();
    let body = block_on(body.collect()).unwrap();
    Replay {
        head: head.headers,
        trailers: body.trailers().cloned(),
        body: body.to_bytes(),
    }
}
