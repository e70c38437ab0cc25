//! The five rows of "Calling others", each with callers that are killed, answers that are lost and the job run twice in parallel: the
//! third party counts its effects. With `KILLS=1000`, so many kills for each.
//!
//! Kills come at random. Beside them, in one process, the connection is cut after every byte of every exchange.

use std::collections::BTreeMap;

use crate::jobs as callers;
use crate::jobs::{Row, Seen};
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

/// What was seen, over both stores.
async fn over_both(row: Row) -> [Seen; 2] {
    let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
    [
        callers::kills(&redis.url(), row).await,
        callers::kills(&postgres.url(), row).await,
    ]
}

/// Rows 1 to 4.
async fn one_effect_for_each_call(row: Row) -> [Seen; 2] {
    let all = over_both(row).await;
    for seen in &all {
        assert!(seen.effects.iter().all(|effects| *effects == 1), "{row:?}: {seen:?}");
        assert_eq!(seen.unknown, 0, "{row:?}: every call ended");
        assert!(
            seen.repeated > 0,
            "{row:?}: no request was repeated, so nothing was tested"
        );
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_an_exchange_is_cut_the_party_has_one_effect() {
    for row in [Row::Keys, Row::Ids, Row::Drafts, Row::Check] {
        let seen = callers::cuts(row).await;
        assert!(seen.jobs > 150, "{row:?}: {seen:?}");
        assert_eq!(seen.effects, BTreeMap::from([(1, seen.jobs)]), "{row:?}: {seen:?}");
        assert_eq!(seen.unknown, 0, "{row:?}: every call ended");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wherever_an_exchange_is_cut_a_party_that_offers_nothing_has_what_was_chosen() {
    let seen = callers::cuts(Row::AtMostOnce).await;
    assert!(
        seen.jobs > 150 && seen.effects.keys().all(|effects| *effects <= 1),
        "{seen:?}"
    );
    assert!(seen.unknown > 100 && seen.done_without_effect == 0, "{seen:?}");
    let seen = callers::cuts(Row::AtLeastOnce).await;
    assert!(
        seen.jobs > 150 && seen.effects.keys().all(|effects| *effects >= 1),
        "{seen:?}"
    );
    assert!(
        seen.effects.keys().any(|effects| *effects > 1) && seen.unknown == 0,
        "{seen:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_takes_idempotency_keys_has_one_effect() {
    one_effect_for_each_call(Row::Keys).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_takes_ids_has_one_effect() {
    one_effect_for_each_call(Row::Ids).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_has_drafts_confirms_one() {
    one_effect_for_each_call(Row::Drafts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_can_be_asked_and_heeds_the_fence_has_one_effect() {
    for seen in one_effect_for_each_call(Row::Check).await {
        assert!(seen.found > 0, "nothing was found, so no question was tested: {seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_offers_nothing_has_at_most_one_effect_or_the_outcome_is_done() {
    let mut unknown = 0;
    for seen in over_both(Row::AtMostOnce).await {
        assert!(seen.effects.iter().all(|effects| *effects <= 1), "{seen:?}");
        assert_eq!(seen.done_without_effect, 0, "what is called done is done");
        unknown += seen.unknown;
    }
    assert!(unknown > 0, "no outcome was unknown, so nothing was tested");
    for seen in over_both(Row::AtLeastOnce).await {
        assert!(seen.effects.iter().all(|effects| *effects >= 1), "{seen:?}");
        assert!(
            seen.effects.iter().any(|effects| *effects > 1),
            "nothing was repeated, so nothing was tested"
        );
        assert_eq!(seen.unknown, 0);
    }
}
