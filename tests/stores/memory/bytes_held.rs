//! The byte budget counts the memory that the store holds, even if the responses are slices of
//! larger buffers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tower::Layer;
use tower_idempotency::protocol::{Decision, Outcome, Resolution, StoredResponse};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};

use super::{HOUR, claim, granted};
use crate::support::{Fault, Handler, RemoteStore, post, send, text};

const BUFFER: usize = 1 << 20;

/// A source of slices of large buffers, like a cache, a file or a proxy. It counts the bytes of its
/// live buffers.
#[derive(Clone, Default)]
struct Buffers(Arc<AtomicUsize>);

struct Buffer(Vec<u8>, Buffers);

impl Buffers {
    fn slice(&self, len: usize) -> Bytes {
        self.0.fetch_add(BUFFER, Ordering::SeqCst);
        Bytes::from_owner(Buffer(vec![7; BUFFER], self.clone())).slice(..len)
    }

    fn held(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.1.0.fetch_sub(BUFFER, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn the_byte_budget_bounds_the_memory_that_is_held() {
    let buffers = Buffers::default();
    let handler = {
        let buffers = buffers.clone();
        Handler::new().responding(move |_| {
            let mut response = text(StatusCode::OK, buffers.slice(5_000));
            let header = HeaderValue::from_maybe_shared(buffers.slice(100)).unwrap_or(HeaderValue::from_static("7"));
            response.headers_mut().insert("x-slice", header);
            response
        })
    };
    let store = MemoryStore::builder().with_byte_budget(1 << 20).build();
    let service = IdempotencyLayer::new(store.clone()).layer(handler);
    for n in 0..20 {
        send(&service, post(&n.to_string(), "")).await;
    }
    assert_eq!(buffers.held(), 0, "{:?}", store.stats());
    assert!(store.stats().bytes > 20 * 5_000);
    assert_eq!(send(&service, post("0", "")).await.body, vec![7; 5_000]);
}

#[tokio::test]
async fn a_store_holds_no_buffer_of_the_outcomes_that_it_gets() {
    let buffers = Buffers::default();
    let store = MemoryStore::new();
    let outcome = || {
        Outcome::Stored(StoredResponse {
            head: buffers.slice(10),
            body: buffers.slice(20),
        })
    };
    for n in 0..2 {
        let grant = granted(&store, &claim(n, 0)).await;
        let key = claim(n, 0).key;
        if n == 0 {
            store.complete(&key, grant.owner, &outcome(), HOUR).await.unwrap();
        } else {
            store.renew(&key, grant.owner, Duration::ZERO).await.unwrap();
            let found = Resolution::Completed(outcome(), HOUR);
            store.resolve(&key, grant.owner.fence, &found).await.unwrap();
        }
        assert_eq!(buffers.held(), 0);
        let Decision::Replay(response) = store.claim(&claim(n, 1)).await.unwrap() else {
            panic!("the response is not replayed")
        };
        assert_eq!((&response.head[..], &response.body[..]), (&[7; 10][..], &[7; 20][..]));
        assert_eq!(
            response.body.as_ptr(),
            response.head.as_ptr().wrapping_add(10),
            "head and body are in one allocation"
        );
    }
    assert_eq!(store.stats().bytes, 60);
}

#[tokio::test]
async fn a_response_over_the_whole_budget_is_neither_stored_nor_held() {
    let buffers = Buffers::default();
    let store = MemoryStore::builder().with_byte_budget(10).build();
    let grant = granted(&store, &claim(1, 0)).await;
    let outcome = Outcome::Stored(StoredResponse {
        head: Bytes::new(),
        body: buffers.slice(11),
    });
    store
        .complete(&claim(1, 0).key, grant.owner, &outcome, HOUR)
        .await
        .unwrap();
    drop(outcome);
    assert_eq!((buffers.held(), store.stats().bytes), (0, 0));
    assert_eq!(store.claim(&claim(1, 1)).await.unwrap(), Decision::NotStored);
}

/// At most 64 MiB of deferred writes may wait for an unreachable store. This limit counted the
/// slices, too.
#[tokio::test(start_paused = true)]
async fn a_deferred_write_holds_no_buffer_of_its_response() {
    let buffers = Buffers::default();
    let handler = {
        let buffers = buffers.clone();
        Handler::new().responding(move |_| text(StatusCode::OK, buffers.slice(5_000)))
    };
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone()).with_completion_timeout(Duration::from_secs(10));
    let service = layer.layer(handler);
    store.fail("complete", vec![Fault::Before; 60]);
    assert_eq!(send(&service, post("k", "")).await.status(), 200);
    assert_eq!(layer.drain().running(), 1, "the completion is deferred");
    assert_eq!(buffers.held(), 0);
    store.heal();
    layer.drain().wait().await;
    assert_eq!(send(&service, post("k", "")).await.body, vec![7; 5_000]);
}
