//! Servers that no longer meet the store's requirements while the store uses them: demoted
//! primaries, other servers, new settings.

use std::time::Duration;

use redis::aio::ConnectionManager;
use tower::Layer;
use tower_idempotency::protocol::{Claim, Decision, Fingerprint, IfLost, Resolution};
use tower_idempotency::{Error, ErrorKind, IdempotencyLayer, RedisStore, Store};

use super::cluster::Cluster;
use super::{HOUR, RedisServer, claim, completed, connect, eventually, granted, replayed, stored};
use crate::support::{Handler, post, send};

/// Makes `old` a replica of `new`, as an operator or Sentinel does, and waits until both have the
/// same records.
fn demote(old: &RedisServer, new: &RedisServer) {
    // Replication preserves the order of writes, so a replica with the last write has all of them.
    old.command::<()>("SET last 1");
    for _ in 0..400 {
        if new.command::<Option<String>>("GET last").is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    new.command::<()>("REPLICAOF NO ONE");
    old.command::<()>(&format!("REPLICAOF 127.0.0.1 {}", new.port()));
    old.wait_for("replication", "master_link_status:up");
}

async fn assert_misconfigured<T: std::fmt::Debug>(
    what: &str,
    operation: impl Future<Output = Result<T, Error>>,
    reason: &str,
) {
    let error = operation.await.expect_err(what);
    assert_eq!(error.kind(), ErrorKind::Configuration, "{what}: {error:?}");
    assert!(error.to_string().contains(reason), "{what}: {error}");
}

/// After an error, a store checks the server again. So each store sends one operation only.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_operation_on_a_demoted_primary_is_refused_whatever_it_is() {
    let old = RedisServer::start();
    let new = old.replica();
    let replicated = RedisStore::builder().with_replication(1, Duration::from_secs(1));
    let mut stores = Vec::new();
    for builder in [RedisStore::builder(), replicated] {
        for _ in 0..5 {
            stores.push(builder.clone().connect(&old.url()).await.unwrap());
        }
    }
    completed(&stores[0], 1, "a").await;
    granted(&stores[0], &claim(2, 1)).await;
    // The server knows the scripts. It would otherwise ask for them, and the store would check it.
    for store in &stores {
        replayed(store, 1).await;
        store.peek(&claim(1, 9).key).await.unwrap();
    }
    demote(&old, &new);

    let is_replica = "is a replica";
    let other = Claim {
        fingerprint: Fingerprint::of(b"refund"),
        ..claim(1, 9)
    };
    for stores in stores.chunks(5) {
        assert_misconfigured("a replay", stores[0].claim(&claim(1, 9)), is_replica).await;
        assert_misconfigured("a mismatch", stores[1].claim(&other), is_replica).await;
        assert_misconfigured("a wait", stores[2].claim(&claim(2, 9)), is_replica).await;
        assert_misconfigured("peek", stores[3].peek(&claim(1, 9).key), is_replica).await;
        assert_misconfigured("no record", stores[4].peek(&claim(4, 9).key), is_replica).await;
    }
}

/// The connection stays open, and a claim that replays writes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_primary_shows_and_changes_no_records() {
    let old = RedisServer::start();
    let new = old.replica();
    let store = connect(&old).await;
    completed(&store, 1, "a").await;
    let owner = granted(&store, &claim(2, 1)).await.owner;
    let lost = Claim {
        lease: Duration::from_millis(1),
        ..claim(3, 1)
    };
    let lost_owner = granted(&store, &lost).await.owner;
    demote(&old, &new);

    let is_replica = "is a replica";
    let other = Claim {
        fingerprint: Fingerprint::of(b"refund"),
        ..claim(1, 9)
    };
    let takes_over = Claim {
        if_lost: IfLost::Execute,
        ..claim(3, 9)
    };
    for (what, claim) in [
        ("a replay", &claim(1, 9)),
        ("a mismatch", &other),
        ("a wait", &claim(2, 9)),
        ("a repeated claim", &claim(2, 1)),
        ("an unknown outcome", &claim(3, 9)),
        ("a takeover", &takes_over),
        ("a first claim", &claim(4, 9)),
    ] {
        assert_misconfigured(what, store.claim(claim), is_replica).await;
    }
    for key in 1..5 {
        assert_misconfigured("peek", store.peek(&claim(key, 1).key), is_replica).await;
    }
    let key = &claim(2, 1).key;
    assert_misconfigured("renew", store.renew(key, owner, HOUR), is_replica).await;
    assert_misconfigured("complete", store.complete(key, owner, &stored("b"), HOUR), is_replica).await;
    assert_misconfigured("release", store.release(key, owner), is_replica).await;
    let absent = Resolution::Absent;
    assert_misconfigured(
        "resolve",
        store.resolve(&lost.key, lost_owner.fence, &absent),
        is_replica,
    )
    .await;
    assert_misconfigured("watch", store.watch(key), is_replica).await;

    let handler = Handler::new();
    let layer = IdempotencyLayer::new(store.clone()).dangerously_run_unprotected_when_the_store_fails();
    let refused = send(&layer.layer(handler.clone()), post("k", "x")).await;
    assert_eq!(
        (refused.status(), refused.code(), handler.runs()),
        (500, "store-misconfigured", 0)
    );

    old.command::<()>("REPLICAOF NO ONE");
    assert_eq!(replayed(&store, 1).await.body, "a");
    assert!(matches!(
        store.claim(&claim(2, 9)).await.unwrap(),
        Decision::Wait { .. }
    ));
}

/// `replica-serve-stale-data no`: the replica replies MASTERDOWN while its primary is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_primary_without_its_new_primary_is_a_replica_too() {
    let old = RedisServer::with(&["--replica-serve-stale-data", "no"]);
    let store = connect(&old).await;
    completed(&store, 1, "a").await;
    old.command::<()>("REPLICAOF 127.0.0.1 1");
    assert_misconfigured("a replay", store.claim(&claim(1, 9)), "is a replica").await;
    assert_misconfigured("peek", store.peek(&claim(1, 9).key), "is a replica").await;
}

/// A replica that takes writes refuses no script. Its role shows at the next check, which a new
/// connection causes.
#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_primary_with_writable_replicas_is_noticed_on_the_next_connection() {
    let old = RedisServer::with(&["--replica-read-only", "no"]);
    let new = old.replica();
    let store = connect(&old).await;
    completed(&store, 1, "a").await;
    demote(&old, &new);
    old.command::<()>("CLIENT KILL TYPE normal SKIPME yes");
    assert!(refusal(&store, 1).await.to_string().contains("is a replica"));
    assert_misconfigured("a first claim", store.claim(&claim(2, 9)), "is a replica").await;
}

/// Returns the error of the first claim that reaches the server after the connection broke.
async fn refusal(store: &RedisStore, key: u8) -> Error {
    let asked = eventually(|| async {
        match store.claim(&claim(key, 9)).await {
            Err(error) if error.kind() == ErrorKind::StoreUnavailable => Err(error),
            asked => Ok(asked),
        }
    });
    asked.await.expect_err("the store must refuse the server")
}

/// Sets a policy that allows the server to evict records, and restarts it.
async fn assert_evicting_server_is_refused(mut server: RedisServer, store: RedisStore) {
    completed(&store, 1, "a").await;
    server.restart_with(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let error = refusal(&store, 1).await;
    assert!(error.to_string().contains("maxmemory-policy"), "{error}");
    assert_misconfigured("a first claim", store.claim(&claim(2, 9)), "maxmemory-policy").await;
    server.command::<()>("CONFIG SET maxmemory 0");
    assert_eq!(replayed(&store, 1).await.body, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_may_evict_after_a_restart_is_refused_before_it_is_used() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    assert_evicting_server_is_refused(server, store).await;
}

/// Another user of the same connection may be the first to notice that it broke. Or no user notices
/// it, because the client reconnects by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_the_application_is_checked_after_a_restart_too() {
    for protocol in ["resp2", "resp3"] {
        let server = RedisServer::start();
        let client = redis::Client::open(format!("{}?protocol={protocol}", server.url())).unwrap();
        let manager: ConnectionManager = client.get_connection_manager().await.unwrap();
        let store = RedisStore::from_connection_manager(manager).await.unwrap();
        assert_evicting_server_is_refused(server, store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_a_cluster_is_no_single_server() {
    let cluster = Cluster::start();
    let mut errors = 0;
    // The key of the check lies on one of the three nodes.
    for url in cluster.urls() {
        let Err(error) = RedisStore::connect(&url).await else {
            continue;
        };
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
        assert!(error.to_string().contains("from_cluster"), "{error}");
        errors += 1;
    }
    assert_eq!(errors, 2);
}
