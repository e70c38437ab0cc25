//! Servers that die, hang or fill up, and connections that break.

use std::sync::Arc;
use std::time::Duration;

use tower::Layer;
use tower_idempotency::protocol::{Claim, Decision, IfLost, Status};
use tower_idempotency::{BoxStore, ErrorKind, IdempotencyLayer, RedisStore, Store};

use super::{HOUR, RedisServer, claim, completed, connect, eventually, granted, replayed, stored};
use crate::support::operation::{Case, Operation};
use crate::support::{Handler, Timer, post, send};

#[tokio::test]
async fn records_outlive_the_server_and_the_store_finds_it_again() {
    let mut server = RedisServer::start();
    let store = connect(&server).await;
    completed(&store, 1, "a").await;
    let grant = granted(&store, &claim(2, 1)).await;
    server.restart();
    let response = eventually(|| async { store.claim(&claim(1, 9)).await }).await;
    assert!(matches!(response, Decision::Replay(response) if response.body == "a"));
    assert!(matches!(
        store.claim(&claim(2, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
    server.restart();
    eventually(|| async { store.complete(&claim(2, 1).key, grant.owner, &stored("b"), HOUR).await }).await;
    server.restart();
    assert!(
        eventually(|| async { store.peek(&claim(2, 1).key).await })
            .await
            .is_some()
    );
    assert_eq!(replayed(&store, 2).await.body, "b");
}

#[tokio::test]
async fn a_server_that_is_gone_is_unavailable_within_the_timeout_and_comes_back() {
    let mut server = RedisServer::start();
    let store = RedisStore::connect(&server.url()).await.unwrap();
    server.kill();
    for _ in 0..4 {
        // The response timeout is 500 ms by default.
        let timer = Timer::start();
        let error = store.claim(&claim(1, 1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert!(timer.elapsed() < Duration::from_millis(900), "{:?}", timer.elapsed());
    }
    // Longer than the client itself tries to connect.
    tokio::time::sleep(Duration::from_secs(4)).await;
    server.restart();
    let decision = eventually(|| async { store.claim(&claim(1, 1)).await }).await;
    assert!(matches!(decision, Decision::Execute(_)));
}

#[tokio::test]
async fn a_claim_on_a_server_that_hangs_times_out_and_the_same_nonce_gets_the_same_grant_afterwards() {
    let server = RedisServer::start();
    let store = RedisStore::builder()
        .with_response_timeout(Duration::from_millis(100))
        .connect(&server.url())
        .await
        .unwrap();
    // The layer relies on the claim limit, so a wrapper must pass it on.
    let boxed = BoxStore::new(Arc::new(store.clone()));
    assert_eq!(boxed.claim_limit(), Some(Duration::from_millis(100)));
    completed(&store, 9, "warm").await;
    server.signal("-STOP");
    let error = store.claim(&claim(1, 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    server.signal("-CONT");
    // The claim had reached the server, and its reply was lost.
    let peeked = eventually(|| async { store.peek(&claim(1, 1).key).await })
        .await
        .unwrap();
    assert!(matches!(peeked.status, Status::InFlight { .. }));
    let grant = granted(&store, &claim(1, 1)).await;
    assert_eq!((grant.attempt, grant.owner.fence), (1, peeked.fence));
    assert!(matches!(
        store.claim(&claim(1, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
}

#[tokio::test]
async fn a_broken_connection_wakes_the_waiters_and_new_watches_work() {
    let mut server = RedisServer::start();
    let store = connect(&server).await;
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    let watch = store.watch(&key).await.unwrap();
    server.restart();
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
    let watch = eventually(|| async { store.watch(&key).await }).await;
    store.complete(&key, grant.owner, &stored("a"), HOUR).await.unwrap();
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
    // The server alone closes this connection.
    let mut watch = Box::pin(store.watch(&claim(2, 1).key).await.unwrap());
    assert!(futures::poll!(&mut watch).is_pending());
    server.command::<u64>("CLIENT KILL TYPE pubsub");
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
}

#[tokio::test]
async fn a_full_server_takes_no_new_keys_but_replays_and_lets_owners_end() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    completed(&store, 1, "a").await;
    let granted_before = granted(&store, &claim(2, 1)).await;
    server.command::<()>("CONFIG SET maxmemory 1");
    let error = store.claim(&claim(3, 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreFull, "{error:?}");
    assert!(store.peek(&claim(3, 1).key).await.unwrap().is_none());
    assert_eq!(replayed(&store, 1).await.body, "a");
    // The reply to this claim was lost. The store must not take the claim for one that was never
    // recorded.
    assert_eq!(granted(&store, &claim(2, 1)).await.owner, granted_before.owner);
    let key = claim(2, 1).key;
    store.renew(&key, granted_before.owner, HOUR).await.unwrap();
    store
        .complete(&key, granted_before.owner, &stored("b"), HOUR)
        .await
        .unwrap();
    assert_eq!(replayed(&store, 2).await.body, "b");

    let service = IdempotencyLayer::new(store).layer(Handler::new());
    let got = send(&service, post("new", "x")).await;
    assert_eq!((got.status(), got.code()), (503, "store-full"));
    server.command::<()>("CONFIG SET maxmemory 0");
    assert_eq!(send(&service, post("new", "x")).await.status(), 201);
}

/// A full server refuses only operations that grant a key. Every other one can be repeated there,
/// and so can a claim that was granted before.
#[tokio::test]
async fn a_full_server_refuses_grants_and_no_other_operation() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    for operation in Operation::all() {
        let grants = matches!(operation, Operation::Claim(_))
            || matches!(operation, Operation::TakeOver(if_lost) if if_lost != IfLost::Refuse);
        let (new, repeated) = (Case::new(&operation, &store).await, Case::new(&operation, &store).await);
        let first = repeated.run(&store).await.unwrap();
        server.command::<()>("CONFIG SET maxmemory 1");
        let reply = new.run(&store).await;
        let again = repeated.run(&store).await;
        match &reply {
            Ok(reply) => new.check(reply, false),
            Err(error) => assert_eq!(error.kind(), ErrorKind::StoreFull, "{operation:?}: {error:?}"),
        }
        assert_eq!(reply.is_err(), grants, "{operation:?}: {reply:?}");
        if grants {
            assert!(!new.has_effect(&store).await, "{operation:?}");
        }
        // A lease that is over cannot be repeated without a write.
        match (&operation, again) {
            (Operation::Claim(Duration::ZERO), Err(error)) => assert_eq!(error.kind(), ErrorKind::StoreFull),
            (_, again) => repeated.check(&again.unwrap(), true),
        }
        server.command::<()>("CONFIG SET maxmemory 0");
        repeated.repeat(Some(&first), &store).await;
        new.repeat(reply.ok().as_ref(), &store).await;
    }
}

/// The rest of a lease may end before the first renewal of an owner that takes it for a whole one.
#[tokio::test]
async fn a_full_server_repeats_no_grant_with_less_than_half_of_its_lease() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let claim = Claim {
        lease: Duration::from_secs(2),
        ..claim(1, 1)
    };
    let owner = granted(&store, &claim).await.owner;
    server.command::<()>("CONFIG SET maxmemory 1");
    assert_eq!(granted(&store, &claim).await.owner, owner);
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let error = store.claim(&claim).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreFull, "{error:?}");
    server.command::<()>("CONFIG SET maxmemory 0");
    assert_eq!(granted(&store, &claim).await.owner, owner);
}

#[tokio::test]
async fn the_layer_serves_through_a_restart() {
    let mut server = RedisServer::start();
    let handler = Handler::new();
    let service = IdempotencyLayer::new(connect(&server).await).layer(handler.clone());
    for n in 0..5 {
        let key = format!("key-{n}");
        assert_eq!(send(&service, post(&key, "x")).await.status(), 201);
        server.restart();
        let mut got = send(&service, post(&key, "x")).await;
        for _ in 0..20 {
            if got.status() != 503 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            got = send(&service, post(&key, "x")).await;
        }
        assert!(got.is_replay(), "{got:?}");
    }
    assert_eq!(handler.runs(), 5);
}

#[tokio::test]
async fn a_server_with_too_few_replicas_is_unavailable_for_writes_and_still_replays() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    completed(&store, 1, "a").await;
    server.command::<()>("CONFIG SET min-replicas-to-write 1");
    let error = store.claim(&claim(2, 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    assert!(format!("{error:?}").contains("NOREPLICAS"), "{error:?}");
    assert_eq!(replayed(&store, 1).await.body, "a");
    server.command::<()>("CONFIG SET min-replicas-to-write 0");
    granted(&store, &claim(2, 1)).await;
}

#[tokio::test]
async fn a_server_that_cannot_save_is_unavailable_for_writes_and_still_replays() {
    let server = RedisServer::with(&["--appendonly", "no", "--save", "3600 1"]);
    let store = connect(&server).await;
    completed(&store, 1, "a").await;
    let grant = granted(&store, &claim(2, 1)).await;
    server.lose_its_disk();
    let error = store.claim(&claim(3, 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    assert!(format!("{error:?}").contains("MISCONF"), "{error:?}");
    let done = store.complete(&claim(2, 1).key, grant.owner, &stored("b"), HOUR).await;
    assert_eq!(done.unwrap_err().kind(), ErrorKind::StoreUnavailable);
    assert_eq!(replayed(&store, 1).await.body, "a");
}
