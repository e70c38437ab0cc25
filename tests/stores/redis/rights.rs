//! Users with too few rights, and users with just enough rights.

use std::error::Error as _;
use std::time::Duration;

use redis::cluster::ClusterClientBuilder;
use tower::Layer;
use tower_idempotency::protocol::{Completion, Decision, Release, Renewal};
use tower_idempotency::store::conformance;
use tower_idempotency::{ErrorKind, IdempotencyLayer, RedisStore, Store};

use super::cluster::Cluster;
use super::{HOUR, RedisServer, claim, completed, granted, replayed, stored};
use crate::support::{Handler, post, send};

/// Returns a line of the documentation of `RedisStore`.
fn documented(line: &str) -> String {
    let source = include_str!("../../../src/store/redis/mod.rs");
    let found = source.lines().find(|documented| documented.contains(line));
    let found = found.unwrap_or_else(|| panic!("{line} is not documented"));
    found.trim_start_matches("///").trim().to_owned()
}

fn url(server: &RedisServer) -> String {
    format!("redis://app:secret@127.0.0.1:{}", server.port())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_suffice() {
    let server = RedisServer::start();
    let _replica = server.replica();
    server.command::<()>(&documented("ACL SETUSER app on"));
    let store = RedisStore::connect(&url(&server)).await.unwrap();
    conformance::all(&store).await;
    let builder = RedisStore::builder().with_replication(1, Duration::from_secs(1));
    let replicated = builder.connect(&url(&server)).await.unwrap();
    conformance::all(&replicated).await;

    let key = claim(1, 1).key;
    let owner = granted(&store, &claim(1, 1)).await.owner;
    let watch = store.watch(&key).await.unwrap();
    assert_eq!(
        store.complete(&key, owner, &stored("a"), HOUR).await.unwrap(),
        Completion::Completed
    );
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
    let denied: Vec<String> = server.run(redis::cmd("ACL").arg("LOG"));
    assert!(denied.is_empty(), "{denied:?}");
}

/// Without `+select`, the start failed with "cannot be reached".
#[tokio::test(flavor = "multi_thread")]
async fn a_database_other_than_0_needs_select_and_the_start_names_it() {
    let server = RedisServer::start();
    server.command::<()>(&documented("ACL SETUSER app on"));
    let url = format!("{}/1", url(&server));
    let error = RedisStore::connect(&url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
    assert!(error.to_string().contains("SELECT"), "{error}");
    assert_eq!(
        documented("`+select`"),
        "* A database other than 0 (`redis://127.0.0.1/1`) also needs `+select`."
    );
    server.command::<()>("ACL SETUSER app +select");
    server.command::<()>("ACL LOG RESET");
    let store = RedisStore::connect(&url).await.unwrap();
    conformance::all(&store).await;
    let denied: Vec<redis::Value> = server.run(redis::cmd("ACL").arg("LOG"));
    assert!(denied.is_empty(), "{denied:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_exist_is_refused_by_its_number() {
    let server = RedisServer::with(&["--databases", "4"]);
    for database in [4, 99] {
        let url = format!("{}{database}", server.url());
        let error = RedisStore::connect(&url).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
        assert!(error.to_string().contains("database"), "{error}");
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains(&format!("database {database}")), "{cause}");
    }
    RedisStore::connect(&format!("{}3", server.url())).await.unwrap();
    let node = RedisServer::with(&["--cluster-enabled", "yes"]);
    let error = RedisStore::connect(&format!("{}1", node.url())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_suffice_in_a_cluster() {
    let cluster = Cluster::start();
    let line = documented("ACL SETUSER app on").replace("+info", "+info +cluster|slots +ping +asking");
    assert_eq!(
        documented("+cluster|slots"),
        "* A Cluster also needs `+cluster|slots +ping +asking`."
    );
    cluster.command(&line);
    let urls = cluster.urls().map(|url| url.replace("redis://", "redis://app:secret@"));
    let client = ClusterClientBuilder::new(urls).retries(0).build().unwrap();
    let store = RedisStore::from_cluster(client.get_async_connection().await.unwrap())
        .await
        .unwrap();
    for key in 0..50 {
        completed(&store, key, "a").await;
        assert_eq!(replayed(&store, key).await.body, "a");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_command_is_refused_at_the_start_with_the_name_of_the_command() {
    let server = RedisServer::start();
    for command in ["eval", "evalsha", "get", "set", "del", "pexpireat", "time"] {
        server.command::<()>("ACL DELUSER app");
        server.command::<()>(&documented("ACL SETUSER app on"));
        server.command::<()>(&format!("ACL SETUSER app -{command}"));
        let error = RedisStore::connect(&url(&server)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{command}: {error:?}");
        assert!(error.to_string().contains(&command.to_uppercase()), "{error}");
        let cause = error.source().unwrap().to_string();
        assert!(cause.contains(command), "{command}: {cause}");
    }
    // Only a store that waits for replicas needs WAIT.
    server.command::<()>(&documented("ACL SETUSER app on"));
    server.command::<()>("ACL SETUSER app -wait");
    RedisStore::connect(&url(&server)).await.unwrap();
    let builder = RedisStore::builder().with_replication(1, Duration::from_secs(1));
    let error = builder.connect(&url(&server)).await.unwrap_err();
    assert!(error.source().unwrap().to_string().contains("wait"), "{error:?}");
    // The user may access other keys than those of the store.
    server.command::<()>("ACL SETUSER app resetkeys ~shop:*");
    let error = RedisStore::connect(&url(&server)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
    let builder = RedisStore::builder().with_prefix("shop:");
    builder.connect(&url(&server)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_renames_a_command_is_refused_at_the_start() {
    let server = RedisServer::with(&["--rename-command", "PEXPIREAT", ""]);
    let error = RedisStore::connect(&server.url()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
    assert!(error.source().unwrap().to_string().contains("pexpireat"), "{error:?}");
    let server = RedisServer::with(&["--rename-command", "EVAL", ""]);
    let error = RedisStore::connect(&server.url()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_revoked_later_causes_no_second_effect() {
    let server = RedisServer::start();
    server.command::<()>(&documented("ACL SETUSER app on"));
    let store = RedisStore::connect(&url(&server)).await.unwrap();
    completed(&store, 1, "a").await;
    let owner = granted(&store, &claim(2, 1)).await.owner;
    let key = claim(2, 1).key;
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone())
        .dangerously_run_unprotected_when_the_store_fails()
        .layer(handler.clone());
    for command in ["set", "get", "time", "evalsha"] {
        server.command::<()>(&format!("ACL SETUSER app -{command}"));
        let refused = send(&service, post("new", "x")).await;
        assert_eq!(
            (refused.status(), refused.code()),
            (500, "store-misconfigured"),
            "{command}"
        );
        let error = store.complete(&key, owner, &stored("b"), HOUR).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{command}: {error:?}");
        server.command::<()>(&format!("ACL SETUSER app +{command}"));
    }
    assert_eq!(handler.runs(), 0);
    assert!(matches!(
        store.claim(&claim(2, 9)).await.unwrap(),
        Decision::Wait { .. }
    ));
    assert_eq!(store.renew(&key, owner, HOUR).await.unwrap(), Renewal::Renewed);
    assert_eq!(store.release(&key, owner).await.unwrap(), Release::Released);
    assert_eq!(replayed(&store, 1).await.body, "a");
}
