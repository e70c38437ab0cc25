//! A network that breaks in the middle of a command or of its reply.

use std::time::Duration;

use futures::future::join_all;
use tower_idempotency::protocol::Decision;
use tower_idempotency::{ErrorKind, RedisStore, Store};

use super::{RedisServer, claim, connect, eventually, granted};
use crate::support::proxy::{Direction, Fate, Proxy, cut_after_every_byte, reply_late};

async fn through_proxy(server: &RedisServer) -> (RedisStore, Proxy) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let url = server.url_by(proxy.address.port());
    (RedisStore::connect(&url).await.unwrap(), proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_cut_after_any_byte_can_be_repeated() {
    let server = RedisServer::start();
    let direct = connect(&server).await;
    let proxied = join_all((0..4).map(|_| through_proxy(&server))).await;
    let cuts = cut_after_every_byte(proxied, &direct).await;
    println!("{cuts} cuts");
    assert!(cuts > 500, "{cuts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drops_one_direction_is_given_up_in_time() {
    let server = RedisServer::start();
    let direct = connect(&server).await;
    let (proxied, proxy) = through_proxy(&server).await;
    for (key, direction) in [(1, Direction::ToServer), (2, Direction::ToClient)] {
        proxy.set(Fate::Swallow(direction));
        let asked = tokio::time::timeout(Duration::from_secs(20), proxied.claim(&claim(key, 1))).await;
        let error = asked.expect("the store gives up in time").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert_eq!(granted(&direct, &claim(key, 1)).await.attempt, 1);
        proxy.heal();
        let repeated = claim(key, 1);
        let again = eventually(|| proxied.claim(&repeated));
        let again = tokio::time::timeout(Duration::from_secs(60), again).await;
        assert!(matches!(again, Ok(Decision::Execute(_))), "{again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_reply_is_late_can_be_repeated() {
    let server = RedisServer::start();
    let direct = connect(&server).await;
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let builder = RedisStore::builder().with_response_timeout(Duration::from_millis(100));
    let proxied = builder.connect(&server.url_by(proxy.address.port())).await.unwrap();
    reply_late((&proxied, &proxy), &direct, Duration::from_millis(300)).await;
}
