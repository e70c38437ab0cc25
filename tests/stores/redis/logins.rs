//! Servers that refuse the connections of a store for longer than the Redis client itself retries.

use std::time::Duration;

use redis::cluster::ClusterClientBuilder;
use tower_idempotency::{Error, ErrorKind, RedisStore, Store};

use super::cluster::Cluster;
use super::{HOUR, RedisServer, claim, completed, eventually, granted, replayed, stored};

const USER: &str = "ACL SETUSER app on >secret ~* &* +@all";

fn url(server: &RedisServer) -> String {
    format!("redis://app:secret@127.0.0.1:{}", server.port())
}

/// Uses the store until the Redis client has given up, and returns the error of the store.
async fn until_misconfigured(store: &RedisStore) -> Error {
    for _ in 0..200 {
        match store.peek(&claim(1, 1).key).await {
            Err(error) if error.kind() == ErrorKind::Configuration => return error,
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    panic!("the server still accepts the user");
}

/// Asserts that a store and its clone work.
async fn works(store: &RedisStore, key: u8) {
    let (clone, first) = (store.clone(), claim(key, 1));
    eventually(|| clone.claim(&first)).await;
    assert_eq!(replayed(store, 1).await.body, "a");
    let watch = store.watch(&claim(key, 1).key).await.unwrap();
    let owner = granted(store, &claim(key, 1)).await.owner;
    store
        .complete(&claim(key, 1).key, owner, &stored("b"), HOUR)
        .await
        .unwrap();
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
}

/// The client cached the error of its last login forever, so the store failed until its process was
/// restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_works_again_after_its_user_was_removed_and_created_again() {
    let server = RedisServer::start();
    server.command::<()>(USER);
    let store = RedisStore::connect(&url(&server)).await.unwrap();
    completed(&store, 1, "a").await;
    for round in 0..2 {
        server.command::<()>("ACL DELUSER app");
        let error = until_misconfigured(&store).await;
        assert!(error.to_string().contains("credentials"), "{error}");
        server.command::<()>(USER);
        works(&store, 7 + round).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_operation_after_a_refused_login_succeeds() {
    let server = RedisServer::start();
    server.command::<()>(USER);
    let store = RedisStore::connect(&url(&server)).await.unwrap();
    let before = server.calls("hello");
    server.command::<()>("ACL DELUSER app");
    // The client itself tries seven times.
    for _ in 0..400 {
        if server.calls("hello") >= before + 7 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(server.calls("hello"), before + 7);
    server.command::<()>(USER);
    granted(&store, &claim(1, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_works_again_after_it_lost_and_got_back_the_right_to_select_its_database() {
    let server = RedisServer::start();
    server.command::<()>(USER);
    let store = RedisStore::connect(&format!("{}/2", url(&server))).await.unwrap();
    completed(&store, 1, "a").await;
    server.command::<()>("ACL SETUSER app -select");
    server.command::<()>("CLIENT KILL USER app");
    let error = until_misconfigured(&store).await;
    assert!(error.to_string().contains("SELECT"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("database 2"), "{source}");
    server.command::<()>("ACL SETUSER app +select");
    works(&store, 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_a_cluster_works_again_after_its_user_was_removed_and_created_again() {
    let cluster = Cluster::start();
    cluster.command(USER);
    let urls = cluster.urls().map(|url| url.replace("redis://", "redis://app:secret@"));
    let client = ClusterClientBuilder::new(urls).retries(0).build().unwrap();
    let store = RedisStore::from_cluster(client.get_async_connection().await.unwrap())
        .await
        .unwrap();
    completed(&store, 1, "a").await;
    cluster.command("ACL DELUSER app");
    for _ in 0..30 {
        assert!(store.peek(&claim(1, 1).key).await.is_err());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cluster.command(USER);
    let first = claim(7, 1);
    eventually(|| store.claim(&first)).await;
    assert_eq!(replayed(&store, 1).await.body, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_is_repeated_at_most_once_a_second() {
    let server = RedisServer::start();
    server.command::<()>(USER);
    let store = RedisStore::connect(&url(&server)).await.unwrap();
    server.command::<()>("ACL DELUSER app");
    until_misconfigured(&store).await;
    let before = server.calls("hello");
    for _ in 0..2_000 {
        let error = store.peek(&claim(1, 1).key).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let logins = server.calls("hello") - before;
    assert!((1..=10).contains(&logins), "{logins} logins in 2,000 operations");
}
