//! The memory store against its contract, clause by clause, and against its bounds.

mod bytes_held;
mod clocks;
mod runtimes;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use proptest::prelude::*;
use tower::Layer;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Record, Release, Renewal,
    Resolution, ResolveResult, Status, StorageKey, StoredResponse, Transition,
};
use tower_idempotency::{Clock, ErrorKind, IdempotencyLayer, MemoryStore, Store, Timestamp};

use crate::support::{Handler, post, send};

const HOUR: Duration = Duration::from_secs(3_600);

fn clock() -> Clock {
    Clock::manual(Timestamp::from_micros(1_700_000_000_000_000))
}

fn claim(key: u8, nonce: u8) -> Claim {
    Claim {
        key: StorageKey::from_bytes([key; 32]),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: Duration::from_secs(30),
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

fn stored(body: &str) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: Bytes::from(body.to_owned()),
    })
}

async fn granted(store: &MemoryStore, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("no grant: {other:?}"),
    }
}

/// The layer holds a lock while it calls `claim_now`. In a full store, the call looked through all
/// open records.
#[tokio::test]
async fn claim_now_frees_no_records_and_leaves_that_to_claim() {
    const RECORDS: u8 = 200;
    for is_completed in [true, false] {
        let clock = clock();
        let builder = MemoryStore::builder().with_record_budget(RECORDS.into());
        let store = builder.with_clock(clock.clone()).build();
        for key in 0..RECORDS {
            let (claim, owner) = match store.claim_now(&claim(key, 1)) {
                Some(Ok(Decision::Execute(grant))) => (claim(key, 1), grant.owner),
                other => panic!("{other:?}"),
            };
            if is_completed {
                store.complete(&claim.key, owner, &stored("x"), HOUR).await.unwrap();
            } else {
                store.renew(&claim.key, owner, Duration::ZERO).await.unwrap();
            }
        }
        // The store decides claims that need no new record at once.
        let again = store.claim_now(&claim(0, 2)).unwrap().unwrap();
        let unchanged = matches!(again, Decision::Replay(_) | Decision::Unknown);
        assert!(unchanged, "{again:?}");
        assert!(store.claim_now(&claim(RECORDS, 1)).is_none());
        assert_eq!(
            store.claim(&claim(RECORDS, 1)).await.unwrap_err().kind(),
            ErrorKind::StoreFull
        );
        clock.advance(2 * HOUR);
        assert!(store.claim_now(&claim(RECORDS, 1)).is_none());
        assert_eq!(store.stats().records, u64::from(RECORDS));
        granted(&store, &claim(RECORDS, 1)).await;
        assert_eq!(store.stats().records, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn exactly_one_of_many_concurrent_claims_is_granted() {
    let store = MemoryStore::new();
    for key in 0..200 {
        let claims = (0..16).map(|nonce| {
            let store = store.clone();
            tokio::spawn(async move { store.claim(&claim(key, nonce)).await.unwrap() })
        });
        let decisions = futures::future::join_all(claims).await;
        let granted = decisions
            .iter()
            .filter(|decision| matches!(decision, Ok(Decision::Execute(_))))
            .count();
        assert_eq!(granted, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_key_is_never_absent_between_in_flight_and_completed() {
    let store = MemoryStore::new();
    for key in 0..=255 {
        let grant = granted(&store, &claim(key, 0)).await;
        let looking = tokio::spawn({
            let store = store.clone();
            async move {
                loop {
                    match store.claim(&claim(key, 1)).await.unwrap() {
                        Decision::Wait { .. } => {}
                        Decision::Replay(response) => return response,
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        tokio::task::yield_now().await;
        store
            .complete(&claim(key, 0).key, grant.owner, &stored("a"), HOUR)
            .await
            .unwrap();
        assert_eq!(looking.await.unwrap().body, "a");
    }
}

#[tokio::test]
async fn an_owner_needs_no_renewal_and_never_counts_as_lost_unless_it_gives_up() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let grant = granted(&store, &claim(1, 1)).await;
    assert_eq!(grant.lease, None);
    clock.advance(100 * HOUR);
    store.sweep();
    assert!(matches!(
        store.claim(&claim(1, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
    let key = claim(1, 1).key;
    assert_eq!(
        store.renew(&key, grant.owner, Duration::ZERO).await.unwrap(),
        Renewal::Renewed
    );
    assert_eq!(store.peek(&key).await.unwrap().unwrap().status, Status::Lost);
    assert_eq!(store.stats().in_flight, 1);
    assert_eq!(store.claim(&claim(1, 2)).await.unwrap(), Decision::Unknown);
    assert_eq!((store.stats().records, store.stats().in_flight), (1, 0));
    // The store forgets an unknown outcome after its retention.
    clock.advance(HOUR);
    store.sweep();
    assert_eq!((store.stats().records, store.stats().in_flight), (0, 0));
}

#[tokio::test]
async fn a_watch_wakes_at_every_end_and_at_once_where_nothing_is_in_flight() {
    let store = MemoryStore::new();
    let key = claim(1, 1).key;
    store.watch(&key).await.unwrap().await;
    for end in ["complete", "release", "give up"] {
        let claim = claim(1, 1);
        let grant = granted(&store, &claim).await;
        let watch = store.watch(&key).await.unwrap();
        assert_eq!(store.stats().waiters, 1);
        let mut watch = std::pin::pin!(watch);
        assert!(futures::poll!(watch.as_mut()).is_pending());
        match end {
            "complete" => {
                let done = store
                    .complete(&key, grant.owner, &stored("a"), Duration::ZERO)
                    .await
                    .unwrap();
                assert_eq!(done, Completion::Completed);
            }
            "release" => assert_eq!(store.release(&key, grant.owner).await.unwrap(), Release::Released),
            _ => drop(store.renew(&key, grant.owner, Duration::ZERO).await.unwrap()),
        }
        watch.await;
    }
    assert_eq!(store.stats().waiters, 0);
}

#[tokio::test]
async fn budgets_hold_and_expiry_makes_room() {
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_record_budget(3)
        .build();
    for key in 0..3 {
        let grant = granted(&store, &claim(key, 0)).await;
        store
            .complete(&claim(key, 0).key, grant.owner, &stored("x"), HOUR)
            .await
            .unwrap();
    }
    assert_eq!(
        store.claim(&claim(9, 0)).await.unwrap_err().kind(),
        ErrorKind::StoreFull
    );
    assert_eq!(store.stats().in_flight, 0, "a refused claim leaves nothing");
    clock.advance(HOUR + Duration::from_secs(1));
    assert!(matches!(store.claim(&claim(9, 0)).await.unwrap(), Decision::Execute(_)));
    assert_eq!((store.stats().records, store.stats().bytes), (1, 0));
}

#[tokio::test]
async fn a_response_larger_than_the_whole_budget_becomes_a_tombstone_and_evicts_no_other() {
    let store = MemoryStore::builder().with_byte_budget(100).build();
    for (key, body) in [(1, "small"), (2, &"x".repeat(200)[..])] {
        let grant = granted(&store, &claim(key, 0)).await;
        store
            .complete(&claim(key, 0).key, grant.owner, &stored(body), HOUR)
            .await
            .unwrap();
    }
    assert!(matches!(store.claim(&claim(1, 1)).await.unwrap(), Decision::Replay(_)));
    assert_eq!(store.claim(&claim(2, 1)).await.unwrap(), Decision::NotStored);
}

#[tokio::test(start_paused = true)]
async fn a_store_removes_expired_records_on_a_timer_and_its_task_ends_with_it() {
    let store = MemoryStore::new();
    for key in 0..100 {
        let grant = granted(&store, &claim(key, 0)).await;
        let retention = Duration::from_secs(10);
        store
            .complete(&claim(key, 0).key, grant.owner, &stored("x"), retention)
            .await
            .unwrap();
    }
    assert_eq!(store.stats().records, 100);
    tokio::time::sleep(Duration::from_secs(13)).await;
    assert_eq!((store.stats().records, store.stats().bytes), (0, 0));
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    drop(store);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), tasks - 1);
}

#[tokio::test]
async fn a_resolution_takes_the_place_of_a_lost_outcome() {
    let store = MemoryStore::new();
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    let resolution = Resolution::Completed(stored("found"), HOUR);
    let fence = grant.owner.fence;
    assert_eq!(
        store.resolve(&key, fence, &resolution).await.unwrap(),
        ResolveResult::Conflict(Some(fence))
    );
    store.renew(&key, grant.owner, Duration::ZERO).await.unwrap();
    assert_eq!(
        store.resolve(&key, fence, &resolution).await.unwrap(),
        ResolveResult::Resolved
    );
    assert!(matches!(store.claim(&claim(1, 2)).await.unwrap(), Decision::Replay(response) if response.body == "found"));
}

#[tokio::test]
async fn a_hundred_thousand_keys_stay_within_the_budget() {
    let store = MemoryStore::builder().with_record_budget(100_000).build();
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    for n in 0..100_000 {
        assert_eq!(send(&service, post(&format!("key-{n}"), "x")).await.status(), 201);
    }
    assert_eq!(send(&service, post("one-more", "x")).await.code(), "store-full");
    for n in (0..100_000).step_by(97) {
        assert!(send(&service, post(&format!("key-{n}"), "x")).await.is_replay(), "{n}");
    }
    let counts = store.stats();
    assert_eq!(
        (counts.records, counts.in_flight, handler.runs()),
        (100_000, 0, 100_000)
    );
    assert!(counts.bytes < 100_000 * 100);
}

#[tokio::test]
async fn counts_are_right_after_a_release_an_abandoned_claim_and_a_claim_of_an_expired_key() {
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_record_budget(1)
        .build();
    let counts = |records, in_flight| {
        let counts = store.stats();
        assert_eq!((counts.records, counts.in_flight), (records, in_flight));
    };
    let key = claim(1, 1).key;
    for _ in 0..3 {
        let grant = granted(&store, &claim(1, 1)).await;
        counts(1, 1);
        store.release(&key, grant.owner).await.unwrap();
        counts(0, 0);
    }
    // An abandoned claim that has expired is claimed again before a sweep. It takes no second
    // place.
    let grant = granted(&store, &claim(1, 1)).await;
    store.renew(&key, grant.owner, Duration::ZERO).await.unwrap();
    clock.advance(2 * HOUR);
    let grant = granted(&store, &claim(1, 2)).await;
    counts(1, 1);
    // The sweep removes the abandoned record, which makes room for another one.
    store.renew(&key, grant.owner, Duration::ZERO).await.unwrap();
    clock.advance(2 * HOUR);
    store.sweep();
    counts(0, 0);
    granted(&store, &claim(2, 1)).await;
    counts(1, 1);
}

/// A rejected message counted as in flight for its whole retention.
#[tokio::test]
async fn an_unknown_record_is_not_in_flight_and_is_subtracted_once() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let counts = |records, in_flight, case: &str| {
        let counts = store.stats();
        assert_eq!((counts.records, counts.in_flight), (records, in_flight), "{case}");
    };
    let key = claim(1, 1).key;
    // Another key stays in flight, so that the test sees a count that is subtracted twice.
    granted(&store, &claim(2, 1)).await;
    for end in ["completed", "resolved", "released", "expired", "claimed anew"] {
        let grant = granted(&store, &claim(1, 1)).await;
        counts(2, 2, end);
        for _ in 0..2 {
            let rejected = store.complete(&key, grant.owner, &Outcome::Rejected, HOUR).await;
            assert_eq!(rejected.unwrap(), Completion::Completed);
            counts(2, 1, end);
        }
        assert_eq!(store.claim(&claim(1, 2)).await.unwrap(), Decision::Unknown);
        let records = match end {
            "completed" => {
                let done = store.complete(&key, grant.owner, &stored("late"), HOUR).await;
                assert_eq!(done.unwrap(), Completion::Completed);
                2
            }
            "resolved" => {
                let resolved = store.resolve(&key, grant.owner.fence, &Resolution::Absent).await;
                assert_eq!(resolved.unwrap(), ResolveResult::Resolved);
                1
            }
            "released" => {
                assert_eq!(store.release(&key, grant.owner).await.unwrap(), Release::Released);
                1
            }
            "expired" => {
                clock.advance(2 * HOUR);
                store.sweep();
                1
            }
            _ => {
                clock.advance(2 * HOUR);
                let grant = granted(&store, &claim(1, 3)).await;
                counts(2, 2, end);
                store.release(&key, grant.owner).await.unwrap();
                1
            }
        };
        counts(records, 1, end);
        clock.advance(2 * HOUR);
        store.sweep();
    }
}

/// The task looked through all open records at once, including every rejected message.
#[tokio::test(start_paused = true)]
async fn a_sweep_of_abandoned_records_lets_other_tasks_run() {
    const RECORDS: u8 = 200;
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    for key in 0..RECORDS {
        let grant = granted(&store, &claim(key, 1)).await;
        let key = claim(key, 1).key;
        store
            .complete(&key, grant.owner, &Outcome::Rejected, HOUR)
            .await
            .unwrap();
    }
    // The task that sweeps starts its timer.
    tokio::task::yield_now().await;
    clock.advance(2 * HOUR);
    tokio::time::advance(Duration::from_secs(2)).await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
        seen.insert(store.stats().records);
    }
    assert!(seen.contains(&0) && seen.len() > 10, "{seen:?}");
}

#[tokio::test]
async fn a_new_response_is_not_evicted_in_place_of_the_expired_one() {
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_byte_budget(100)
        .build();
    let complete = |key: u8, body: &'static str, retention| {
        let store = store.clone();
        async move {
            let grant = granted(&store, &claim(key, 0)).await;
            store
                .complete(&claim(key, 0).key, grant.owner, &stored(body), retention)
                .await
                .unwrap();
        }
    };
    complete(1, "some forty bytes, which expire very soon", Duration::from_millis(10)).await;
    complete(2, "some forty bytes, so the budget is in use", HOUR).await;
    clock.advance(Duration::from_millis(20));
    complete(1, "some forty bytes that replace the others", HOUR).await;
    assert!(matches!(store.claim(&claim(2, 1)).await.unwrap(), Decision::Replay(_)));
    // Evicts the oldest responses. The first response of key 1 has expired, so this is that of key 2.
    complete(3, "some forty bytes that exceed the budget", HOUR).await;
    assert_eq!(store.claim(&claim(2, 1)).await.unwrap(), Decision::NotStored);
    assert!(
        matches!(store.claim(&claim(1, 1)).await.unwrap(), Decision::Replay(response) if response.body.ends_with(b"others"))
    );
}

/// A record expired, and the next request with its key completed a record before any sweep.
#[tokio::test]
async fn a_sweep_of_an_expired_record_leaves_the_record_that_replaced_it() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    for (retention, wait) in [(10_000, 10_100), (3_600_000, 2_000)] {
        let grant = granted(&store, &claim(1, 1)).await;
        let (outcome, retention) = (stored("x"), Duration::from_millis(retention));
        store
            .complete(&claim(1, 1).key, grant.owner, &outcome, retention)
            .await
            .unwrap();
        clock.advance(Duration::from_millis(wait));
    }
    store.sweep();
    assert_eq!(store.stats().records, 1);
    assert!(matches!(store.claim(&claim(1, 2)).await.unwrap(), Decision::Replay(_)));
}

#[tokio::test]
async fn a_renewal_for_a_limited_time_leaves_the_lease_endless() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    let renewed = store.renew(&key, grant.owner, Duration::from_secs(1)).await.unwrap();
    assert_eq!(renewed, Renewal::Renewed);
    clock.advance(HOUR / 2);
    let status = store.peek(&key).await.unwrap().unwrap().status;
    assert!(matches!(status, Status::InFlight { .. }), "{status:?}");
}

#[tokio::test]
async fn a_watch_wakes_when_a_sweep_removes_an_expired_record_without_an_outcome() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    store.renew(&key, grant.owner, Duration::ZERO).await.unwrap();
    clock.advance(2 * HOUR);
    let mut watch = Box::pin(store.watch(&key).await.unwrap());
    assert!(watch.as_mut().now_or_never().is_none());
    store.sweep();
    assert!(watch.now_or_never().is_some());
}

/// One step of a random history. The test applies it to the store and to the pure record.
#[derive(Clone, Debug)]
enum Step {
    Claim(u8, IfLost, bool),
    Complete(u8, u8),
    GiveUp(u8),
    Pass(u32),
    Release(u8),
    Resolve(u8, bool),
    Sweep,
}

fn a_step() -> impl Strategy<Value = Step> {
    let if_lost = prop_oneof![Just(IfLost::Execute), Just(IfLost::Recover), Just(IfLost::Refuse)];
    prop_oneof![
        4 => (0_u8..4, if_lost, any::<bool>()).prop_map(|(nonce, lost, same)| Step::Claim(nonce, lost, same)),
        2 => (0_u8..4, any::<u8>()).prop_map(|(nonce, body)| Step::Complete(nonce, body)),
        1 => (0_u8..4).prop_map(Step::GiveUp),
        1 => (1_u32..5_000).prop_map(Step::Pass),
        1 => (0_u8..4).prop_map(Step::Release),
        1 => (0_u8..4, any::<bool>()).prop_map(|(nonce, absent)| Step::Resolve(nonce, absent)),
        1 => Just(Step::Sweep),
    ]
}

/// The pure record with an endless lease, which is the promise of the memory store.
struct Model {
    record: Option<Record>,
    clock: Clock,
}

impl Model {
    fn apply<R>(&mut self, transition: Transition<R>) -> R {
        match transition.change {
            Change::Unchanged => {}
            Change::Put(record) => self.record = Some(record),
            Change::Remove => self.record = None,
        }
        transition.reply
    }
}

fn unleased(decision: Decision) -> Decision {
    match decision {
        Decision::Execute(grant) => Decision::Execute(Grant { lease: None, ..grant }),
        Decision::Recover(grant) => Decision::Recover(Grant { lease: None, ..grant }),
        other => other,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_decides_as_the_pure_record_does(steps in prop::collection::vec(a_step(), 1..50)) {
        let clock = clock();
        let store = MemoryStore::builder().with_clock(clock.clone()).build();
        let mut model = Model { record: None, clock: clock.clone() };
        let mut owners = [None; 4];
        let key = claim(1, 0).key;
        futures::executor::block_on(async {
            for step in steps {
                let now = model.clock.now();
                match step {
                    Step::Claim(nonce, if_lost, same) => {
                        let fingerprint = if same { Fingerprint::of(b"pay") } else { Fingerprint::NONE };
                        let claim = Claim { if_lost, fingerprint, lease: Duration::MAX, ..claim(1, nonce) };
                        let wanted = model.apply(Record::claim(model.record.as_ref(), &claim, now));
                        let got = store.claim(&claim).await.unwrap();
                        if let Decision::Execute(grant) | Decision::Recover(grant) = &got {
                            owners[usize::from(nonce)] = Some(grant.owner);
                        }
                        prop_assert_eq!(got, unleased(wanted));
                    }
                    Step::Complete(nonce, body) => if let Some(owner) = owners[usize::from(nonce)] {
                        let outcome = stored(&body.to_string());
                        let wanted = Record::complete(model.record.as_ref(), owner, &outcome, HOUR, now);
                        let wanted = model.apply(wanted);
                        prop_assert_eq!(store.complete(&key, owner, &outcome, HOUR).await.unwrap(), wanted);
                    },
                    Step::GiveUp(nonce) => if let Some(owner) = owners[usize::from(nonce)] {
                        let wanted = model.apply(Record::renew(model.record.as_ref(), owner, Duration::ZERO, now));
                        prop_assert_eq!(store.renew(&key, owner, Duration::ZERO).await.unwrap(), wanted);
                    },
                    Step::Release(nonce) => if let Some(owner) = owners[usize::from(nonce)] {
                        let wanted = model.apply(Record::release(model.record.as_ref(), owner, now));
                        prop_assert_eq!(store.release(&key, owner).await.unwrap(), wanted);
                    },
                    Step::Resolve(nonce, absent) => if let Some(owner) = owners[usize::from(nonce)] {
                        let found = Resolution::Completed(stored("found"), HOUR);
                        let resolution = if absent { Resolution::Absent } else { found };
                        let wanted = Record::resolve(model.record.as_ref(), owner.fence, &resolution, now);
                        let wanted = model.apply(wanted);
                        prop_assert_eq!(store.resolve(&key, owner.fence, &resolution).await.unwrap(), wanted);
                    },
                    Step::Pass(seconds) => clock.advance(Duration::from_secs(seconds.into())),
                    Step::Sweep => store.sweep(),
                }
                let peeked = Record::peek(model.record.as_ref(), model.clock.now());
                prop_assert_eq!(store.peek(&key).await.unwrap(), peeked);
                // One microsecond, so that no two attempts begin at the same time.
                clock.advance(Duration::from_micros(1));
            }
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn the_debug_form_shows_the_statistics() {
    let store = MemoryStore::new();
    granted(&store, &claim(1, 1)).await;
    let shown = format!("{store:?}");
    assert!(
        shown.starts_with("MemoryStore") && shown.contains("in_flight: 1"),
        "{shown}"
    );
}

#[test]
fn clones_are_one_store_and_it_works_without_a_runtime() {
    let store = Arc::new(MemoryStore::new());
    let clone = MemoryStore::clone(&store);
    futures::executor::block_on(async {
        granted(&clone, &claim(1, 1)).await;
        assert!(matches!(
            store.claim(&claim(1, 2)).await.unwrap(),
            Decision::Wait { .. }
        ));
    });
}
