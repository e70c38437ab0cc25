//! The requirements that a store checks on its server before it uses it.

use std::error::Error as _;
use std::time::Duration;

use tower_idempotency::{Error, ErrorKind, RedisStore, Store};

use super::{RedisServer, claim, completed, granted, replayed};

async fn refused(url: &str) -> Error {
    let error = RedisStore::connect(url).await.unwrap_err();
    assert!(!format!("{error:?} {error}").contains("hunter2"), "{error:?}");
    error
}

#[tokio::test]
async fn a_server_that_may_evict_is_refused_with_the_name_of_its_setting() {
    let server = RedisServer::with(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let error = refused(&server.url()).await;
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("maxmemory-policy"), "{error}");
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("allkeys-lru") && cause.contains("noeviction"), "{cause}");
    server.command::<()>("CONFIG SET maxmemory 0");
    RedisStore::connect(&server.url()).await.unwrap();
}

#[tokio::test]
async fn wrong_and_missing_passwords_are_refused_and_not_shown() {
    let server = RedisServer::with(&["--requirepass", "right"]);
    for url in [
        format!("redis://:hunter2@127.0.0.1:{}", server.port()),
        format!("redis://somebody:hunter2@127.0.0.1:{}", server.port()),
        server.url(),
    ] {
        let error = refused(&url).await;
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
        assert!(error.to_string().contains("credentials"), "{error}");
    }
    let store = RedisStore::connect(&format!("redis://:right@127.0.0.1:{}", server.port()))
        .await
        .unwrap();
    assert!(!format!("{store:?}").contains("right"), "{store:?}");
    completed(&store, 1, "a").await;
}

#[tokio::test]
async fn invalid_urls_and_unreachable_servers_have_different_errors() {
    for url in [
        "",
        "hunter2",
        "http://user:hunter2@host",
        "redis://user:hunter2@host:port",
    ] {
        assert_eq!(refused(url).await.kind(), ErrorKind::Configuration, "{url}");
    }
    #[cfg(not(feature = "redis-rustls"))]
    assert_eq!(
        refused("rediss://user:hunter2@localhost").await.kind(),
        ErrorKind::Configuration
    );
    let error = refused("redis://user:hunter2@127.0.0.1:1").await;
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
}

#[tokio::test]
async fn invalid_settings_are_refused() {
    let server = RedisServer::start();
    let builder = RedisStore::builder;
    for builder in [
        builder().with_response_timeout(Duration::ZERO),
        builder().with_replication(1, Duration::ZERO),
    ] {
        let error = builder.connect(&server.url()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
    }
}

#[tokio::test]
async fn a_user_without_the_rights_to_read_settings_and_to_publish_can_use_the_store() {
    let server = RedisServer::start();
    server.command::<()>("ACL SETUSER app on >pass ~idempotency:* resetchannels +@all -info -config");
    let store = RedisStore::connect(&format!("redis://app:pass@127.0.0.1:{}", server.port()))
        .await
        .unwrap();
    completed(&store, 1, "a").await;
    assert_eq!(replayed(&store, 1).await.body, "a");
    // The layer polls instead.
    assert_eq!(
        store.watch(&claim(1, 1).key).await.unwrap_err().kind(),
        ErrorKind::StoreUnavailable
    );
}

#[tokio::test]
async fn prefixes_keep_applications_apart() {
    let server = RedisServer::start();
    let store = |prefix: &'static str| {
        RedisStore::builder()
            .with_prefix(prefix)
            .connect(&server.url().leak()[..])
    };
    let (one, two) = (store("one:").await.unwrap(), store("").await.unwrap());
    completed(&one, 1, "a").await;
    granted(&two, &claim(1, 1)).await;
    let mut keys: Vec<String> = server.command("KEYS *");
    keys.sort();
    assert_eq!(keys, ["01".repeat(32), format!("one:{}", "01".repeat(32))]);
}

#[tokio::test]
async fn connections_of_the_application_work_and_their_watches_stay_pending() {
    let server = RedisServer::start();
    let client = redis::Client::open(server.url()).unwrap();
    let manager = client.get_connection_manager().await.unwrap();
    let (own, made) = (
        RedisStore::from_connection_manager(manager).await.unwrap(),
        RedisStore::from_client(client).await.unwrap(),
    );
    let mut quiet = Box::pin(own.watch(&claim(1, 1).key).await.unwrap());
    let watch = made.watch(&claim(1, 1).key).await.unwrap();
    completed(&own, 1, "a").await;
    tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
    assert!(futures::poll!(&mut quiet).is_pending());
}
