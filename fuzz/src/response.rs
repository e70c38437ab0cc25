//! Stored responses.
//!
//! A stored response is either unreadable, so that the client gets a refusal, or it replays. The
//! stored form of the replay replays the same again.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt;
use tower_idempotency::protocol::{Decision, Outcome, StoredResponse};
use tower_idempotency::{IdempotencyLayer, Refusal, RefusalKind};

use crate::exchange::{Layered, layer, refused};
use crate::input::Input;

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let body = Bytes::copy_from_slice(&input.take::<2>());
    let stored = StoredResponse {
        head: Bytes::copy_from_slice(input.rest()),
        body,
    };
    let Some(first) = replayed(&stored) else { return };
    assert_eq!(first.body, stored.body);
    let Some(stored) = restored(&first) else { return };
    let second = replayed(&stored).expect("the layer reads what it has written");
    assert_eq!((second.status, &second.body), (first.status, &first.body));
    for name in second.headers.keys() {
        let values = |headers: &HeaderMap| headers.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(values(&second.headers), values(&first.headers), "{name}");
    }
    let third = replayed(&restored(&second).unwrap()).unwrap();
    assert_eq!((third.status, third.headers), (second.status, second.headers));
}

struct Replay {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// Returns the replay of a stored response; `None` if the layer cannot read the response.
fn replayed(stored: &StoredResponse) -> Option<Replay> {
    let layer = layer(Ok(Decision::Replay(stored.clone()))).with_replay_header(None);
    let request = Request::post("/").header("idempotency-key", "k").body(Bytes::new());
    let (_, response) = refused(&layer, request.unwrap());
    if let Some(refusal) = response.extensions().get::<Refusal>() {
        assert_eq!(refusal.kind(), RefusalKind::RecordUnreadable);
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        return None;
    }
    let (head, body) = response.into_parts();
    let body = futures::executor::block_on(body.collect()).unwrap().to_bytes();
    Some(Replay {
        status: head.status,
        headers: head.headers,
        body,
    })
}

/// Returns the stored form of a response; `None` if the layer does not store it.
fn restored(replay: &Replay) -> Option<StoredResponse> {
    let mut response = Response::new(replay.body.clone());
    *response.status_mut() = replay.status;
    *response.headers_mut() = replay.headers.clone();
    let layer: Layered = layer(Ok(Decision::Unknown)).with_replay_header(None);
    match IdempotencyLayer::outcome_of(&layer, response) {
        Outcome::Stored(stored) => Some(stored),
        Outcome::Rejected | Outcome::Tombstone => None,
    }
}
