//! The five rows of "Calling others". Each row has callers that are killed, responses that are
//! lost, and a job that runs twice in parallel. The third party counts its effects. `KILLS=1000`
//! sets the number of kills for each row.
//!
//! The kills come at random. Other tests run in one process and cut the connection after every byte
//! of every exchange.

use std::collections::BTreeMap;

use crate::jobs as callers;
use crate::jobs::{Row, Seen};
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

/// Runs a row over both stores and returns the observations.
async fn over_both(row: Row) -> [Seen; 2] {
    let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
    [
        callers::kills(&redis.url(), row).await,
        callers::kills(&postgres.url(), row).await,
    ]
}

/// Tests one of the rows 1 to 4.
async fn one_effect_for_each_call(row: Row) -> [Seen; 2] {
    let all = over_both(row).await;
    for seen in &all {
        assert!(seen.effects.iter().all(|effects| *effects == 1), "{row:?}: {seen:?}");
        assert_eq!(seen.unknown, 0, "{row:?}: every call has a known outcome");
        assert!(
            seen.repeated > 0,
            "{row:?}: no request was repeated, so nothing was tested"
        );
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exchange_that_is_cut_after_any_byte_has_one_effect() {
    for row in [Row::Keys, Row::Ids, Row::Drafts, Row::Check] {
        let seen = callers::cuts(row).await;
        assert!(seen.jobs > 150, "{row:?}: {seen:?}");
        assert_eq!(seen.effects, BTreeMap::from([(1, seen.jobs)]), "{row:?}: {seen:?}");
        assert_eq!(seen.unknown, 0, "{row:?}: every call has a known outcome");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exchange_that_is_cut_with_a_party_that_offers_nothing_has_the_chosen_guarantee() {
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
async fn a_party_that_can_be_queried_and_checks_the_fence_has_one_effect() {
    for seen in one_effect_for_each_call(Row::Check).await {
        assert!(
            seen.found > 0,
            "no check found an effect, so the check was not tested: {seen:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_party_that_offers_nothing_has_at_most_or_at_least_one_effect_as_chosen() {
    let mut unknown = 0;
    for seen in over_both(Row::AtMostOnce).await {
        assert!(seen.effects.iter().all(|effects| *effects <= 1), "{seen:?}");
        assert_eq!(
            seen.done_without_effect, 0,
            "a job that was reported as done has an effect"
        );
        unknown += seen.unknown;
    }
    assert!(unknown > 0, "no outcome was unknown, so nothing was tested");
    for seen in over_both(Row::AtLeastOnce).await {
        assert!(seen.effects.iter().all(|effects| *effects >= 1), "{seen:?}");
        assert!(
            seen.effects.iter().any(|effects| *effects > 1),
            "no effect was repeated, so nothing was tested"
        );
        assert_eq!(seen.unknown, 0);
    }
}
