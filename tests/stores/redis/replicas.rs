//! Replication and Cluster.

use std::time::Duration;

use redis::cluster::ClusterClient;
use tower::Layer;
use tower_idempotency::protocol::{Completion, Decision, IfLost, Outcome, Release, ResolveResult, Status};
use tower_idempotency::{ErrorKind, IdempotencyLayer, RedisStore, Store};

use super::{HOUR, RedisServer, claim, completed, connect, granted, name, replayed, stored};
use crate::support::operation::{Case, Operation, Reply};
use crate::support::{Handler, Timer, post, send};

async fn replicated(server: &RedisServer, replicas: usize) -> RedisStore {
    let builder = RedisStore::builder().with_replication(replicas, Duration::from_secs(1));
    builder.connect(&server.url()).await.unwrap()
}

#[tokio::test]
async fn a_claim_that_too_few_replicas_have_is_refused_and_a_layer_releases_its_key() {
    let server = RedisServer::start();
    let store = replicated(&server, 1).await;
    assert_eq!(store.claim_limit(), None);
    let error = store.claim(&claim(1, 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    assert_eq!(server.command::<u64>(&format!("EXISTS {}", name(1))), 0);
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(replicated(&server, 1).await);
    let service = layer.layer(handler.clone());
    let refused = send(&service, post("k", "pay")).await;
    assert_eq!((refused.code(), handler.runs()), ("store-unavailable", 0));
    let _replica = server.replica();
    layer.drain().wait().await;
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
}

/// A claim that waited for replicas was cut off. It released the key later, although the repeated
/// claim owned it by then.
#[tokio::test]
async fn a_claim_that_was_cut_off_does_not_release_the_key_of_its_retry() {
    let server = RedisServer::start();
    let replica = server.replica();
    let store = replicated(&server, 1).await;
    granted(&store, &claim(2, 1)).await;
    replica.signal("-STOP");
    let cut = tokio::time::timeout(Duration::from_millis(500), store.claim(&claim(1, 1))).await;
    assert!(cut.is_err());
    // The retry follows the first claim on the connection, and the replica is back between the two.
    let retry = tokio::spawn({
        let store = store.clone();
        async move { super::eventually(|| async { store.claim(&claim(1, 1)).await }).await }
    });
    tokio::time::sleep(Duration::from_millis(800)).await;
    replica.signal("-CONT");
    assert!(matches!(retry.await.unwrap(), Decision::Execute(_)));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(server.command::<u64>(&format!("EXISTS {}", name(1))), 1);
}

#[tokio::test]
async fn grants_and_completions_are_on_the_replica() {
    let server = RedisServer::start();
    let replica = server.replica();
    let store = replicated(&server, 1).await;
    for key in 1..20 {
        let grant = granted(&store, &claim(key, 1)).await;
        assert_eq!(replica.command::<u64>(&format!("STRLEN {}", name(key))), 96);
        let done = store
            .complete(&claim(key, 1).key, grant.owner, &stored("a"), HOUR)
            .await
            .unwrap();
        assert_eq!(done, Completion::Completed);
        assert!(replica.command::<u64>(&format!("STRLEN {}", name(key))) > 96);
    }
}

/// WAIT covers the writes of its own connection, and the completion may have come on another one.
/// So a replay writes the expiry of the record once more.
#[tokio::test]
async fn a_replay_writes_only_where_replicas_must_have_the_response() {
    let server = RedisServer::start();
    let _replica = server.replica();
    for (key, replicas) in [(1, 0), (2, 1)] {
        let store = replicated(&server, replicas).await;
        completed(&store, key, "a").await;
        let written = || server.command::<u64>(&format!("PEXPIRETIME {}", name(key)));
        let expiry = written();
        for is_claim in [true, false] {
            server.command::<u64>(&format!("PEXPIRE {} 1000000", name(key)));
            match is_claim {
                true => drop(replayed(&store, key).await),
                false => drop(store.peek(&claim(key, 2).key).await.unwrap()),
            }
            assert_eq!(written() == expiry, replicas == 1, "{replicas} replicas, {is_claim}");
        }
    }
}

#[tokio::test]
async fn an_outcome_that_too_few_replicas_have_is_an_error_until_they_have_it() {
    let server = RedisServer::start();
    let replica = server.replica();
    let store = replicated(&server, 1).await;
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    replica.signal("-STOP");
    for _ in 0..2 {
        let error = store.complete(&key, grant.owner, &stored("a"), HOUR).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    }
    // On a connection without a write, WAIT would have nothing to wait for.
    let other = replicated(&server, 1).await;
    assert!(other.complete(&key, grant.owner, &stored("a"), HOUR).await.is_err());
    replica.signal("-CONT");
    let done = super::eventually(|| async { store.complete(&key, grant.owner, &stored("a"), HOUR).await }).await;
    assert_eq!(done, Completion::Completed);
    assert!(replica.command::<u64>(&format!("STRLEN {}", name(1))) > 96);
}

#[tokio::test]
async fn a_cluster_of_one_node_forgets_scripts_and_reports_that_it_has_no_replicas() {
    let server = RedisServer::with(&["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"]);
    server.command::<()>("CLUSTER ADDSLOTSRANGE 0 16383");
    server.wait_for_cluster();
    let client = ClusterClient::new([server.url()]).unwrap();
    let store = RedisStore::from_cluster(client.get_async_connection().await.unwrap())
        .await
        .unwrap();
    for key in 1..50 {
        completed(&store, key, "a").await;
        assert_eq!(replayed(&store, key).await.body, "a");
    }
    server.command::<()>("SCRIPT FLUSH");
    let grant = granted(&store, &claim(100, 1)).await;
    assert!(matches!(
        store.claim(&claim(100, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
    assert_eq!(
        store.release(&claim(100, 1).key, grant.owner).await.unwrap(),
        Release::Released
    );
    // This client gets no push messages, so a watch stays pending and the waiter polls.
    let mut watch = Box::pin(store.watch(&claim(1, 1).key).await.unwrap());
    assert!(futures::poll!(&mut watch).is_pending());
    // One node without replicas.
    let connection = client.get_async_connection().await.unwrap();
    let builder = RedisStore::builder().with_replication(1, Duration::from_millis(50));
    let strict = builder.use_cluster(connection).await.unwrap();
    let timer = Timer::start();
    assert_eq!(
        strict.claim(&claim(101, 1)).await.unwrap_err().kind(),
        ErrorKind::StoreUnavailable
    );
    assert!(timer.elapsed() < Duration::from_secs(1));
    assert!(store.peek(&claim(101, 1).key).await.unwrap().is_none());
}

/// The primary is lost while its replica is behind, and the replica takes its place.
async fn fail_over(primary: RedisServer, replica: &RedisServer) -> RedisStore {
    drop(primary);
    replica.signal("-CONT");
    replica.command::<()>("REPLICAOF NO ONE");
    connect(replica).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_loses_writes_that_no_replica_acknowledged() {
    let primary = RedisServer::start();
    let mut replica = primary.replica();
    let store = connect(&primary).await;
    // This write happens while the replica is away.
    replica.kill();
    granted(&store, &claim(1, 1)).await;
    drop(primary);
    replica.restart();
    replica.command::<()>("REPLICAOF NO ONE");
    let store = connect(&replica).await;
    // The guide `choosing_a_store` documents this for a failover to a replica without the write:
    // the key is new again.
    assert_eq!(granted(&store, &claim(1, 2)).await.attempt, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_loses_no_grant_that_a_replica_had_to_acknowledge() {
    let primary = RedisServer::start();
    let replica = primary.replica();
    let store = replicated(&primary, 1).await;
    granted(&store, &claim(1, 1)).await;
    replica.signal("-STOP");
    let error = store.claim(&claim(2, 1)).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::StoreUnavailable,
        "no handler runs without an acknowledged claim"
    );
    let store = fail_over(primary, &replica).await;
    assert!(matches!(
        store.claim(&claim(1, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
    assert_eq!(granted(&store, &claim(2, 2)).await.attempt, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_too_few_replicas_have_is_not_shown() {
    let primary = RedisServer::start();
    let replica = primary.replica();
    let store = replicated(&primary, 1).await;
    let other = replicated(&primary, 1).await;
    for (n, outcome) in [(1, stored("paid")), (2, Outcome::Tombstone)] {
        let owner = granted(&store, &claim(n, 1)).await.owner;
        let key = claim(n, 1).key;
        replica.signal("-STOP");
        let completion = store.complete(&key, owner, &outcome, HOUR).await;
        assert_eq!(completion.unwrap_err().kind(), ErrorKind::StoreUnavailable);
        let claimed = other.claim(&claim(n, 2)).await.map(drop);
        let peeked = other.peek(&key).await.map(drop);
        for shown in [claimed, peeked] {
            let error = shown.expect_err("the outcome is shown");
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error:?}");
        }
        replica.signal("-CONT");
        let shown = super::eventually(|| other.peek(&key)).await.unwrap();
        assert_eq!(shown.status, Status::Completed(outcome.clone()));
        let expected = match outcome {
            Outcome::Stored(response) => Decision::Replay(response),
            _ => Decision::NotStored,
        };
        assert_eq!(other.claim(&claim(n, 2)).await.unwrap(), expected);
    }
}

/// A failover could lose any of these writes.
#[tokio::test(flavor = "multi_thread")]
async fn every_write_that_too_few_replicas_have_is_an_error_until_they_have_it() {
    let primary = RedisServer::start();
    let replica = primary.replica();
    let direct = connect(&primary).await;
    let builder = RedisStore::builder().with_replication(1, Duration::from_millis(50));
    let store = builder.connect(&primary.url()).await.unwrap();
    for operation in Operation::all() {
        use Operation::{Claim, Complete, Resolve, TakeOver};
        let must_last = matches!(operation, Claim(_) | Complete(_) | Resolve(_))
            || matches!(operation, TakeOver(if_lost) if if_lost != IfLost::Refuse);
        if !must_last {
            continue;
        }
        let case = Case::new(&operation, &direct).await;
        replica.signal("-STOP");
        let replies = [case.run(&store).await, case.run(&store).await];
        replica.signal("-CONT");
        for (reply, is_repeat) in replies.into_iter().zip([false, true]) {
            // A resolution that has taken effect cannot be repeated.
            let is_conflict = is_repeat && matches!(reply, Ok(Reply::Resolve(ResolveResult::Conflict(_))));
            let error = reply.err().map(|error| error.kind());
            assert!(
                is_conflict || error == Some(ErrorKind::StoreUnavailable),
                "{operation:?}: {error:?}"
            );
        }
        let reply = case.repeat_until_it_succeeds(&store).await;
        case.repeat(Some(&reply), &direct).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_refused_at_the_start() {
    let primary = RedisServer::start();
    let replica = primary.replica();
    let error = RedisStore::connect(&replica.url()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
}
