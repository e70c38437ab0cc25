//! Calls of any kind that take effect once, and jobs whose steps take effect once.

use std::collections::HashMap;
use std::future::{pending, ready};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::Notify;
use tokio::time::timeout;
use tower_idempotency::Recovered;
use tower_idempotency::client::{Attempt, Done, Failure, Once, OnceError, once};
use tower_idempotency::protocol::{Fence, Resolution, Status};
use tower_idempotency::{Drain, ErrorKind, MemoryStore, Store};

use crate::support;
use crate::support::late::LateStore;
use crate::support::{Fault, RemoteStore};

type Ended<T> = Result<Done<T>, OnceError<T, String>>;

/// A third party that counts its effects.
#[derive(Clone, Default)]
struct Party {
    effects: Arc<AtomicUsize>,
}

impl Party {
    fn effects(&self) -> usize {
        self.effects.load(Ordering::SeqCst)
    }

    async fn create(&self) -> usize {
        tokio::task::yield_now().await;
        self.effects.fetch_add(1, Ordering::SeqCst) + 1
    }

    async fn run<St: Store + Clone>(&self, call: Once<St>) -> Ended<usize> {
        let party = self.clone();
        call.run(|_| async move { Ok(party.create().await) }).await
    }

    /// Runs a call that fails with this failure. An unknown outcome comes after the effect, any
    /// other failure before it.
    async fn fail<St: Store + Clone>(&self, call: Once<St>, failure: Failure<String>) -> Ended<usize> {
        let party = self.clone();
        call.run(|_| async move {
            if let Failure::Unknown(_) = failure {
                party.create().await;
            }
            Err(failure)
        })
        .await
    }
}

fn unknown() -> Failure<String> {
    Failure::Unknown("reset".to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_call_is_made_once_and_its_value_is_replayed() {
    for store in [RemoteStore::new()] {
        let party = Party::default();
        let first = party.run(once(store.clone(), "k")).await.unwrap();
        let again = party.run(once(store.clone(), "k")).await.unwrap();
        assert_eq!(
            (first.attempt(), first.is_replay(), *first.value()),
            (Some(1), false, 1)
        );
        assert_eq!(
            (again.attempt(), again.is_replay(), again.into_value()),
            (None, true, 1)
        );
        // A call with another key, scope, namespace or secret is another call.
        for other in [
            once(store.clone(), "l"),
            once(store.clone(), "k").with_scope("tenant-7"),
            once(store.clone(), "k").with_namespace("mails"),
            once(store.clone(), "k").with_secret(&[7; 32]).unwrap(),
        ] {
            assert!(!party.run(other).await.unwrap().is_replay());
        }
        assert_eq!(party.effects(), 5);
    }
}

#[tokio::test(start_paused = true)]
async fn concurrent_runs_of_a_job_make_its_call_once() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let everywhere = (0..100).map(|_| party.run(once(store.clone(), "k")));
    let ended = join_all(everywhere).await;
    assert!(ended.iter().all(|ended| *ended.as_ref().unwrap().value() == 1));
    assert_eq!(
        ended
            .iter()
            .filter(|ended| !ended.as_ref().unwrap().is_replay())
            .count(),
        1
    );
    assert_eq!(party.effects(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_failed_without_effect_runs_again_and_one_with_an_unknown_outcome_does_not() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let call = || once(store.clone(), "k");
    let refused = party
        .fail(call(), Failure::NotDone("closed".to_owned()))
        .await
        .unwrap_err();
    assert!(matches!(&refused, OnceError::Failed(error) if error == "closed"));
    assert!(!refused.may_have_happened());
    assert_eq!(store.len(), 0, "the key is free");

    let lost = party.fail(call(), unknown()).await.unwrap_err();
    assert!(matches!(&lost, OnceError::Unknown(Some(error)) if error == "reset"));
    for _ in 0..3 {
        let later = party.run(call()).await.unwrap_err();
        assert!(matches!(later, OnceError::Unknown(None)) && later.may_have_happened());
    }
    assert_eq!(party.effects(), 1);

    // An operator has asked the third party and resolves the key.
    let (key, _) = store.only();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
    assert_eq!(*party.run(call()).await.unwrap().value(), 2);
}

#[tokio::test(start_paused = true)]
async fn at_least_once_runs_again_under_the_same_id_until_the_attempts_are_used_up() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let ids = Arc::new(Mutex::new(Vec::new()));
    let call = |fails: bool| {
        let (party, ids) = (party.clone(), Arc::clone(&ids));
        let job = once(store.clone(), "k").at_least_once().with_max_attempts(3);
        job.run(move |attempt: Attempt| async move {
            ids.lock()
                .unwrap()
                .push((attempt.number(), attempt.fence(), attempt.id("order")));
            let effect = party.create().await;
            if fails { Err(unknown()) } else { Ok(effect) }
        })
    };
    assert!(call(true).await.is_err());
    let done = call(false).await.unwrap();
    assert_eq!((done.attempt(), party.effects()), (Some(2), 2));
    {
        let ids = ids.lock().unwrap();
        assert_eq!((ids[0].0, ids[1].0), (1, 2));
        assert!(ids[0].1 < ids[1].1, "the fence grows");
        assert_eq!(ids[0].2, ids[1].2, "the id does not change");
        assert_eq!((ids[0].2.len(), ids[0].2.as_bytes()[14]), (36, b'8'));
    }
    let party = Party::default();
    let job = || once(store.clone(), "l").at_least_once().with_max_attempts(3);
    for _ in 0..5 {
        assert!(matches!(party.fail(job(), unknown()).await, Err(OnceError::Unknown(_))));
    }
    assert_eq!(party.effects(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_later_attempt_that_fails_does_not_turn_a_lost_one_into_a_failure() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let job = || once(store.clone(), "k").at_least_once();
    party.fail(job(), unknown()).await.unwrap_err();
    let later = party
        .fail(job(), Failure::NotDone("closed".to_owned()))
        .await
        .unwrap_err();
    assert!(
        matches!(later, OnceError::Unknown(Some(_))),
        "the first attempt may have taken effect"
    );
    // If the check finds that the lost attempt had no effect, the failure of the next attempt
    // counts.
    let call = once(store.clone(), "l");
    party.fail(call.clone(), unknown()).await.unwrap_err();
    let recovered = call.run_or_recover(
        |_| ready(Recovered::<usize>::NotHappened),
        |_| ready(Err(Failure::NotDone("closed".to_owned()))),
    );
    assert!(matches!(recovered.await, Err(OnceError::Failed(_))));
}

#[tokio::test(start_paused = true)]
async fn an_existence_check_runs_only_after_a_lost_attempt_and_never_concurrently() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let asked = Arc::new(AtomicUsize::new(0));
    let run = |found: Recovered<usize>| {
        let (party, asked) = (party.clone(), Arc::clone(&asked));
        let check = move |_| {
            asked.fetch_add(1, Ordering::SeqCst);
            ready(found)
        };
        once(store.clone(), "k").run_or_recover(check, |_| async move {
            let effect = party.create().await;
            if effect == 1 { Err(unknown()) } else { Ok(effect) }
        })
    };
    assert!(matches!(
        run(Recovered::Unknown).await,
        Err(OnceError::Unknown(Some(_)))
    ));
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    // The check cannot decide, so nothing runs, and the call does not count as failed.
    assert!(matches!(run(Recovered::Unknown).await, Err(OnceError::Unknown(None))));
    assert_eq!((asked.load(Ordering::SeqCst), party.effects()), (1, 1));
    let both = join_all([run(Recovered::Happened(1)), run(Recovered::Happened(1))]).await;
    assert!(both.into_iter().all(|done| done.unwrap().into_value() == 1));
    assert_eq!(
        (asked.load(Ordering::SeqCst), party.effects()),
        (2, 1),
        "the result of the check is recorded"
    );
    assert!(run(Recovered::Unknown).await.unwrap().is_replay());
}

#[tokio::test(start_paused = true)]
async fn a_call_runs_if_its_check_finds_no_effect_and_not_if_the_check_panics() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let call = || once(store.clone(), "k");
    party.fail(call(), unknown()).await.unwrap_err();
    let panics = |_| -> std::future::Ready<Recovered<usize>> { panic!("the check is broken") };
    let never = |_| ready(Ok::<usize, Failure<String>>(0));
    assert!(matches!(
        call().run_or_recover(panics, never).await,
        Err(OnceError::Unknown(None))
    ));
    let again = party.clone();
    let done = call().run_or_recover(
        |_| ready(Recovered::NotHappened),
        |_| async move { Ok::<_, Failure<String>>(again.create().await) },
    );
    assert_eq!((done.await.unwrap().attempt(), party.effects()), (Some(3), 2));
}

/// No check can rule out that the lost request is still in transit during the check and arrives
/// afterwards. The settling delay narrows the gap. A third party that refuses older fences closes
/// it.
#[tokio::test(start_paused = true)]
async fn a_request_that_arrives_after_the_check_takes_effect_unless_the_delay_or_the_fence_prevents_it() {
    for (settling, heeds_fence, effects) in [(0, false, 2), (5, false, 1), (0, true, 1)] {
        let (party, store) = (Party::default(), RemoteStore::new());
        let least = Arc::new(Mutex::new(Fence::new(0)));
        // The caller of this request has died. The request arrives two seconds later.
        let in_transit = move |party: Party, least: Arc<Mutex<Fence>>, fence: Fence| async move {
            tokio::time::sleep(Duration::from_secs(2)).await;
            if !heeds_fence || fence >= *least.lock().unwrap() {
                party.create().await;
            }
        };
        let call = || once(store.clone(), "k").with_settle_delay(Duration::from_secs(settling));
        let (sent, bound) = (party.clone(), Arc::clone(&least));
        let lost = call().run(move |attempt: Attempt| async move {
            tokio::spawn(in_transit(sent, bound, attempt.fence()));
            Err::<usize, _>(unknown())
        });
        lost.await.unwrap_err();
        let (seen, created) = (party.clone(), party.clone());
        let check = move |attempt: Attempt| async move {
            *least.lock().unwrap() = attempt.fence();
            match seen.effects() {
                0 => Recovered::NotHappened,
                effect => Recovered::Happened(effect),
            }
        };
        let done = call().run_or_recover(
            check,
            |_| async move { Ok::<_, Failure<String>>(created.create().await) },
        );
        assert_eq!(done.await.unwrap().into_value(), 1);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(
            party.effects(),
            effects,
            "settling {settling} s, heeds the fence: {heeds_fence}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_panics_has_an_unknown_outcome() {
    let store = RemoteStore::new();
    let call = once(store.clone(), "k").run(|_| async { panic!("bug") as Result<u32, Failure<String>> });
    assert!(matches!(call.await, Err(OnceError::Unknown(None))));
    let later = once(store, "k").run(|_| async { Ok::<_, Failure<String>>(1) });
    assert!(matches!(later.await, Err(OnceError::Unknown(None))));
}

#[tokio::test(start_paused = true)]
async fn another_input_under_the_same_key_is_a_mismatch() {
    let (party, store) = (Party::default(), RemoteStore::new());
    let call = |input: &str| party.run(once(store.clone(), "k").with_input(input));
    call("amount=1").await.unwrap();
    assert!(matches!(call("amount=2").await, Err(OnceError::Mismatch)));
    assert!(call("amount=1").await.unwrap().is_replay());
    assert!(
        matches!(party.run(once(store.clone(), "")).await, Err(OnceError::NotRun(error)) if error.kind() == ErrorKind::Configuration)
    );
    assert_eq!(party.effects(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_gets_the_value_in_time_or_in_flight_after_its_wait() {
    let (store, go) = (RemoteStore::new(), Arc::new(Notify::new()));
    let gate = Arc::clone(&go);
    let slow = once(store.clone(), "k").run(|_| async move {
        gate.notified().await;
        Ok::<_, Failure<String>>(7)
    });
    let slow = tokio::spawn(slow);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let never = |_| ready(Ok::<u32, Failure<String>>(0));
    let impatient = once(store.clone(), "k").with_wait(Duration::from_secs(2)).run(never);
    assert!(matches!(impatient.await, Err(OnceError::InFlight { left }) if left <= Duration::from_secs(30)));
    let patient = tokio::spawn(once(store, "k").run(never));
    tokio::time::sleep(Duration::from_secs(3)).await;
    go.notify_one();
    assert_eq!(*patient.await.unwrap().unwrap().value(), 7);
    assert!(
        !slow.await.unwrap().unwrap().is_replay(),
        "the owner renewed its lease for 100 s"
    );
}

#[tokio::test(start_paused = true)]
async fn a_running_call_goes_on_when_its_caller_leaves_and_a_waiting_one_does_not_start() {
    let (party, store, go) = (Party::default(), RemoteStore::new(), Arc::new(Notify::new()));
    let (gate, effects) = (Arc::clone(&go), party.clone());
    let call = once(store.clone(), "k").run(|_| async move {
        gate.notified().await;
        Ok::<_, Failure<String>>(effects.create().await)
    });
    let call = tokio::spawn(call);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // This call waits for the other one and must not run in its place.
    let waiting = tokio::spawn(once(store.clone(), "k").run(|_| ready(Err::<usize, _>(unknown()))));
    tokio::time::sleep(Duration::from_secs(1)).await;
    for caller in [call, waiting] {
        caller.abort();
        drop(caller.await);
    }
    go.notify_one();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let done = party.run(once(store.clone(), "k")).await.unwrap();
    assert_eq!((done.is_replay(), party.effects()), (true, 1));

    // A call that is dropped at the claim leaves its key free.
    for polls in 0..20 {
        let key = format!("dropped after {polls}");
        let call = party.run(once(store.clone(), &*key));
        if support::poll_then_drop(polls, call).await.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        let before = party.effects();
        let done = party.run(once(store.clone(), &*key)).await.unwrap();
        assert_eq!(party.effects(), before + usize::from(!done.is_replay()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_fails_runs_nothing_and_leaves_no_record() {
    for faults in [
        [Fault::Before, Fault::Before],
        [Fault::Hang, Fault::Hang],
        [Fault::After, Fault::After],
        [Fault::After, Fault::Before],
    ] {
        let (party, store) = (Party::default(), RemoteStore::new());
        store.fail("claim", faults);
        let error = party.run(once(store.clone(), "k")).await.unwrap_err();
        assert!(
            matches!(&error, OnceError::NotRun(error) if error.kind() == ErrorKind::StoreUnavailable),
            "{error:?}"
        );
        assert!(!error.may_have_happened());
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!((party.effects(), store.len()), (0, 0), "{faults:?}");
        assert!(!party.run(once(store.clone(), "k")).await.unwrap().is_replay());
    }
    // If one reply is lost, the layer claims again with the same nonce and gets its grant.
    for fault in [Fault::Before, Fault::After, Fault::Hang] {
        let (party, store) = (Party::default(), RemoteStore::new());
        store.fail("claim", [fault]);
        assert_eq!(party.run(once(store, "k")).await.unwrap().attempt(), Some(1));
    }
    let (party, store) = (Party::default(), RemoteStore::new());
    store.fail("claim", [Fault::Misconfigured]);
    let error = party.run(once(store.clone(), "k")).await.unwrap_err();
    assert!(
        matches!(&error, OnceError::NotRun(error) if error.kind() == ErrorKind::Configuration),
        "{error:?}"
    );
    assert!(!error.may_have_happened());
    store.fail("claim", [Fault::Corrupt]);
    assert!(
        matches!(party.run(once(store, "k")).await, Err(OnceError::NotRun(error)) if error.kind() == ErrorKind::CorruptRecord)
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_claim_is_granted_after_its_caller_has_left_starts_no_work_and_no_check() {
    for is_lost in [false, true] {
        let (party, store) = (Party::default(), RemoteStore::new());
        if is_lost {
            assert!(party.fail(once(store.clone(), "k"), unknown()).await.is_err());
        }
        let (effects, work, checks) = (party.effects(), party.clone(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&checks);
        store.fail("claim", [Fault::Slow(2)]);
        let call = once(store.clone(), "k").run_or_recover(
            move |_| async move {
                counted.fetch_add(1, Ordering::SeqCst);
                Recovered::NotHappened
            },
            |_| async move { Ok::<_, Failure<String>>(work.create().await) },
        );
        assert!(timeout(Duration::from_secs(1), call).await.is_err());
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!((party.effects(), checks.load(Ordering::SeqCst)), (effects, 0));
        assert_eq!((store.calls("release"), store.len()), (1, usize::from(is_lost)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_its_deadline() {
    // The deadline falls between two looks at the record.
    const WAIT: Duration = Duration::from_millis(1_700);
    let store = RemoteStore::new();
    let owner = once(store.clone(), "k").run(|_| pending::<Result<usize, Failure<String>>>());
    let owner = tokio::spawn(owner);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let timer = support::Timer::start();
    let waited = Party::default().run(once(store, "k").with_wait(WAIT)).await;
    assert!(
        matches!(waited, Err(OnceError::InFlight { left }) if left > Duration::from_secs(10)),
        "{waited:?}"
    );
    assert_eq!(timer.elapsed(), WAIT);
    owner.abort();
}

/// The store granted the first claim. Its release would free the key during the call.
#[tokio::test(start_paused = true)]
async fn a_claim_whose_reply_was_lost_is_not_released_once_the_repeated_claim_is_granted() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::After]);
    let call = once(store.clone(), "k").run(|_| async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        Err::<usize, _>(unknown())
    });
    let call = tokio::spawn(call);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (key, _) = store.only();
    let status = store.peek(&key).await.unwrap().unwrap().status;
    assert!(matches!(status, Status::InFlight { .. }), "{status:?}");
    assert!(matches!(call.await.unwrap(), Err(OnceError::Unknown(Some(_)))));
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(store.calls("release"), 0);
    let again = Party::default().run(once(store, "k")).await;
    assert!(matches!(again, Err(OnceError::Unknown(None))), "{again:?}");
}

/// One operation ends each attempt. The guard of the lease would send another one if it still took
/// the attempt for the owner.
#[tokio::test(start_paused = true)]
async fn a_call_that_has_ended_sends_nothing_more_to_the_store() {
    type End = fn() -> Result<usize, Failure<String>>;
    let ends: [(End, &str); 3] = [
        (|| Ok(1), "complete"),
        (|| Err(Failure::NotDone("refused".to_owned())), "release"),
        (|| Err(unknown()), "renew"),
    ];
    for (end, operation) in ends {
        let store = RemoteStore::new();
        let _ = once(store.clone(), "k").run(move |_| ready(end())).await;
        tokio::time::sleep(Duration::from_secs(100)).await;
        for each in ["complete", "release", "renew"] {
            assert_eq!(
                store.calls(each),
                usize::from(each == operation),
                "{each} instead of {operation}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_completion_that_fails_is_repeated_and_then_reported_as_unrecorded() {
    for fault in [Fault::Before, Fault::After, Fault::Hang] {
        let (party, store) = (Party::default(), RemoteStore::new());
        store.fail("complete", [fault, Fault::Before]);
        assert!(!party.run(once(store.clone(), "k")).await.unwrap().is_replay());
        assert!(party.run(once(store, "k")).await.unwrap().is_replay());
        assert_eq!(party.effects(), 1);
    }
    for absence in [60, 600] {
        let (party, store) = (Party::default(), RemoteStore::new());
        store.fail("complete", [Fault::Before; 10_000]);
        let error = party.run(once(store.clone(), "k")).await.unwrap_err();
        assert!(
            matches!(&error, OnceError::Unrecorded { output, .. } if **output == 1),
            "{error:?}"
        );
        assert!(error.may_have_happened());
        tokio::time::sleep(Duration::from_secs(absence)).await;
        store.heal();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let again = party.run(once(store, "k")).await;
        match absence {
            // The value was recorded once the store was reachable again.
            60 => assert!(again.unwrap().is_replay()),
            _ => assert!(matches!(again, Err(OnceError::Unknown(None)))),
        }
        assert_eq!(party.effects(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_superseded_owner_returns_the_value_that_the_key_holds() {
    let (store, go) = (RemoteStore::new(), Arc::new(Notify::new()));
    let gate = Arc::clone(&go);
    // The owner cannot renew its lease and loses it.
    store.fail("renew", [Fault::Before; 100]);
    let job = once(store.clone(), "k").at_least_once();
    let zombie = tokio::spawn(job.clone().run(|attempt: Attempt| async move {
        gate.notified().await;
        Ok::<_, Failure<String>>(format!("zombie, held: {}", attempt.is_held()))
    }));
    tokio::time::sleep(Duration::from_secs(31)).await;
    store.heal();
    let winner = job
        .run(|_| ready(Ok::<_, Failure<String>>("winner".to_owned())))
        .await
        .unwrap();
    assert_eq!(winner.attempt(), Some(2));
    go.notify_one();
    let zombie = zombie.await.unwrap().unwrap();
    assert_eq!((zombie.is_replay(), zombie.into_value()), (true, "winner".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_stored_value_of_another_type_is_unreadable() {
    let (party, store) = (Party::default(), RemoteStore::new());
    party.run(once(store.clone(), "k")).await.unwrap();
    let error = once(store.clone(), "k")
        .run(|_| ready(Ok::<String, Failure<String>>(String::new())))
        .await
        .unwrap_err();
    assert!(matches!(error, OnceError::Unreadable(_)), "{error:?}");
}

/// Returns the results of a first run and a replay of a call that returns `value`.
async fn twice<T>(value: T) -> (Ended<T>, Ended<T>)
where
    T: Clone + Serialize + DeserializeOwned + Send + 'static,
{
    let store = MemoryStore::new();
    let run = |call: Once<MemoryStore>, value: T| call.run(|_| ready(Ok::<_, Failure<String>>(value)));
    let first = run(once(store.clone(), "k"), value.clone()).await;
    (first, run(once(store, "k"), value).await)
}

/// The record stored floats in decimal, and some of them came back with another last bit.
#[tokio::test]
async fn a_replay_returns_floats_bit_for_bit() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let amounts = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // An amount between 0 and 10 million with a fraction.
        state as f64 / u64::MAX as f64 * 1e7
    });
    let amounts: Vec<f64> = amounts.take(20_000).chain([f64::MIN_POSITIVE, -0.0, 5e-324]).collect();
    let (first, again) = twice(amounts.clone()).await;
    let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(first.unwrap().value()), bits(&amounts));
    assert_eq!(bits(again.unwrap().value()), bits(&amounts));
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Paid {
    amount: Option<f64>,
    #[serde(skip)]
    token: String,
    #[serde(skip_serializing, default)]
    note: String,
    way: Way,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Way {
    Number(u64),
    Signed(i64),
}

#[tokio::test]
async fn the_first_caller_gets_the_same_value_as_a_replay() {
    let paid = Paid {
        amount: Some(f64::NAN),
        token: "secret".to_owned(),
        note: "note".to_owned(),
        way: Way::Signed(7),
    };
    let (first, again) = twice(paid).await;
    let (first, again) = (first.unwrap(), again.unwrap());
    assert_eq!(first.value(), again.value());
    assert!(!first.is_replay() && again.is_replay());
    let read = first.into_value();
    assert_eq!(
        (read.amount, &*read.token, &*read.note, read.way),
        (None, "", "", Way::Number(7))
    );
}

/// A value whose own code panics when it is written or read.
#[derive(Clone, Debug)]
struct Panics {
    when_read: bool,
}

impl Serialize for Panics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        assert!(self.when_read, "the type panics when it is written");
        serializer.serialize_unit()
    }
}

impl<'de> Deserialize<'de> for Panics {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        panic!("the type panics when it is read")
    }
}

/// A list of lists, nested to any depth.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Nested(Vec<Nested>);

#[tokio::test]
async fn a_value_that_cannot_be_read_back_is_returned_once_and_its_call_is_not_repeated() {
    async fn is_returned_once<T>(value: T)
    where
        T: Clone + std::fmt::Debug + Serialize + DeserializeOwned + Send + 'static,
    {
        let (first, again) = twice(value).await;
        let first = first.unwrap();
        assert!(!first.is_replay() && first.attempt() == Some(1));
        assert!(
            matches!(&again, Err(error @ OnceError::NotStored) if error.may_have_happened()),
            "{first:?}, then {again:?}"
        );
    }
    is_returned_once(f64::NAN).await;
    is_returned_once((1, f32::INFINITY)).await;
    is_returned_once(HashMap::from([(vec![1], 2)])).await;
    is_returned_once((0..200).fold(Nested(Vec::new()), |inner, _| Nested(vec![inner]))).await;
    is_returned_once(Panics { when_read: true }).await;
    is_returned_once(Panics { when_read: false }).await;
    // The result of a check is stored like the result of a call.
    let store = MemoryStore::new();
    let lost = once(store.clone(), "k").run(|_| ready(Err::<f64, _>(unknown()))).await;
    assert!(matches!(lost, Err(OnceError::Unknown(Some(_)))));
    let recover = || {
        let call = once(store.clone(), "k");
        call.run_or_recover(|_| ready(Recovered::Happened(f64::NAN)), |_| ready(Err(unknown())))
    };
    assert!(recover().await.unwrap().value().is_nan());
    assert!(matches!(recover().await, Err(OnceError::NotStored)));
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_calls_whose_callers_have_left() {
    let (store, drain) = (RemoteStore::new(), Drain::default());
    let (party, go) = (Party::default(), Arc::new(Notify::new()));
    let own = once(store.clone(), "own");
    let drains = [drain.clone(), own.drain()];
    for call in [once(store.clone(), "k").with_drain(&drain), own] {
        let (party, go) = (party.clone(), Arc::clone(&go));
        let call = call.run(|_| async move {
            go.notified().await;
            Ok::<_, Failure<String>>(party.create().await)
        });
        let call = tokio::spawn(call);
        tokio::time::sleep(Duration::from_secs(1)).await;
        call.abort();
        drop(call.await);
    }
    for drain in &drains {
        assert_eq!(drain.running(), 1);
        assert!(timeout(Duration::from_secs(100), drain.wait()).await.is_err());
    }
    go.notify_waiters();
    for drain in drains {
        drain.wait().await;
        assert_eq!(drain.running(), 0);
    }
    assert_eq!(party.effects(), 2);
    for key in ["k", "own"] {
        assert!(party.run(once(store.clone(), key)).await.unwrap().is_replay());
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_calls_with_a_caller_and_for_steps() {
    let (store, drain, go) = (RemoteStore::new(), Drain::default(), Arc::new(Notify::new()));
    let mut job = once(store, "job").with_drain(&drain).steps();
    let gate = Arc::clone(&go);
    let step = job.step("one").run(|_| async move {
        gate.notified().await;
        Ok::<_, Failure<String>>(1)
    });
    let step = tokio::spawn(step);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(timeout(Duration::from_secs(10), drain.wait()).await.is_err());
    go.notify_one();
    drain.wait().await;
    assert_eq!(*step.await.unwrap().unwrap().value(), 1);
}

#[test]
fn a_call_whose_runtime_ends_leaves_its_key_lost_and_not_stuck() {
    let store = MemoryStore::new();
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let first = runtime();
    let hanging = once(store.clone(), "k").run(|_| pending::<Result<u32, Failure<String>>>());
    first.block_on(async {
        drop(timeout(Duration::from_millis(20), hanging).await);
    });
    drop(first);
    let later = once(store, "k")
        .with_wait(Duration::ZERO)
        .run(|_| ready(Ok::<_, Failure<String>>(1)));
    assert!(matches!(runtime().block_on(later), Err(OnceError::Unknown(None))));
}

/// The store loses the reply to a claim, and replies to its repeat that another owner has the key.
/// Before the second reply arrives, the other owner frees the key, and the first copy of the claim
/// is granted.
#[tokio::test(start_paused = true)]
async fn a_copy_of_a_claim_that_is_granted_while_a_reply_is_late_is_released() {
    const SECOND: Duration = Duration::from_secs(1);
    let (store, party, drain) = (RemoteStore::new(), Party::default(), Drain::default());
    let call = || once(store.clone(), "k").with_wait(Duration::ZERO).with_drain(&drain);
    let owner = tokio::spawn(call().run(|_| async {
        tokio::time::sleep(SECOND).await;
        Err::<usize, _>(Failure::NotDone("refused".to_owned()))
    }));
    support::yield_times(10).await;
    store.delay_claim(2 * SECOND);
    store.fail("claim", [Fault::SlowReply(3)]);
    let refused = party.run(call()).await;
    assert!(matches!(refused, Err(OnceError::InFlight { .. })), "{refused:?}");
    assert!(matches!(owner.await.unwrap(), Err(OnceError::Failed(_))));
    drain.wait().await;
    let next = party.run(call()).await;
    assert!(next.is_ok(), "the key is granted to nobody: {next:?}");
}

/// Every reply of the store comes after its timeout, for five minutes.
#[tokio::test(start_paused = true)]
async fn a_store_that_is_late_delays_calls_and_repeats_none() {
    const SECOND: Duration = Duration::from_secs(1);
    let (store, party, drain) = (LateStore::default(), Party::default(), Drain::default());
    let call = |key: usize| party.run(once(store.clone(), key.to_string()).at_least_once().with_drain(&drain));
    store.set_late(true);
    for key in 0..300 {
        let ended = timeout(11 * SECOND, call(key)).await.expect("the call ends in time");
        assert!(matches!(ended, Err(OnceError::NotRun(_))), "{ended:?}");
        assert!(drain.running() <= 300 / 10, "{}", drain.running());
    }
    store.set_late(false);
    drain.wait().await;
    // The lease of a claim that could not be released.
    tokio::time::sleep(30 * SECOND).await;
    for key in 0..300 {
        let ended = call(key).await;
        assert!(ended.is_ok(), "{key}: {ended:?}");
    }
    assert_eq!((party.effects(), drain.running()), (300, 0));
}

mod steps {
    use super::*;

    /// Runs a job of three steps that crashes after `crash` steps. Returns the values of the steps
    /// that ran.
    async fn job(store: &RemoteStore, party: &Party, crash: usize) -> Result<Vec<usize>, OnceError<usize, String>> {
        let mut job = once(store.clone(), "order-1").steps();
        let mut values = Vec::new();
        for (at, name) in ["draft", "fill", "confirm"].into_iter().enumerate() {
            if at == crash {
                return Ok(values);
            }
            values.push(party.run(job.step(name)).await?.into_value());
        }
        Ok(values)
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_resumes_after_its_last_recorded_step() {
        let (party, store) = (Party::default(), RemoteStore::new());
        for (crash, effects) in [(0, 0), (1, 1), (1, 1), (2, 2), (3, 3), (9, 3)] {
            let values = job(&store, &party, crash).await.unwrap();
            assert_eq!(values, (1..=crash.min(3)).collect::<Vec<_>>());
            assert_eq!(party.effects(), effects);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn concurrent_runs_of_a_job_make_each_step_once() {
        let (party, store) = (Party::default(), RemoteStore::new());
        let ended = join_all((0..20).map(|_| job(&store, &party, 9))).await;
        assert!(ended.into_iter().all(|values| values.unwrap() == [1, 2, 3]));
        assert_eq!(party.effects(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn another_list_of_steps_is_an_error_before_anything_runs() {
        let (party, store) = (Party::default(), RemoteStore::new());
        job(&store, &party, 2).await.unwrap();
        for (names, position) in [
            (&["draft", "renamed"][..], 1),
            (&["first", "draft", "fill"], 0),
            (&["fill", "draft"], 0),
            (&["draft", "inserted", "fill"], 1),
        ] {
            let mut steps = once(store.clone(), "order-1").steps();
            let mut ended = None;
            for name in names {
                match party.run(steps.step(name)).await {
                    Ok(done) => assert!(done.is_replay(), "{names:?}"),
                    Err(error) => {
                        ended = Some(error);
                        break;
                    }
                }
            }
            assert!(
                matches!(ended, Some(OnceError::StepChanged { position: at }) if at == position),
                "{names:?}: {ended:?}"
            );
        }
        assert_eq!(party.effects(), 2);
        // A job may have more steps at its end.
        let mut steps = once(store.clone(), "order-1").steps();
        for (name, is_replay) in [("draft", true), ("fill", true), ("confirm", false), ("thank", false)] {
            assert_eq!(party.run(steps.step(name)).await.unwrap().is_replay(), is_replay);
        }
    }

    /// A step that failed without effect and a step that was left out have no record, so only the
    /// later step can show the change.
    #[tokio::test(start_paused = true)]
    async fn a_change_of_steps_without_a_record_is_an_error_at_the_next_step() {
        for fails in [true, false] {
            let (party, store) = (Party::default(), RemoteStore::new());
            let mut steps = once(store.clone(), "order-1").steps();
            let reserve = steps.step("reserve");
            if fails {
                let failure = Failure::NotDone("sold out".to_owned());
                party.fail(reserve, failure).await.unwrap_err();
            }
            party.run(steps.step("confirm")).await.unwrap();
            let mut renamed = once(store, "order-1").steps();
            drop(renamed.step("draft"));
            let ended = party.run(renamed.step("confirm")).await;
            assert!(
                matches!(ended, Err(OnceError::StepChanged { position: 1 })),
                "{fails}: {ended:?}"
            );
            assert_eq!(party.effects(), 1);
        }
    }

    /// The steps of a step had the records of the outer job's first steps, so a nested step with the
    /// same name got the result of another call.
    #[tokio::test(start_paused = true)]
    async fn a_step_of_a_step_is_another_call_than_the_outer_step_at_its_position() {
        let (party, store) = (Party::default(), RemoteStore::new());
        for is_replay in [false, true] {
            let mut order = once(store.clone(), "order-1").steps();
            assert_eq!(party.run(order.step("reserve")).await.unwrap().into_value(), 1);
            let mut shipment = order.step("ship").steps();
            for (name, value) in [("reserve", 2), ("pack", 3)] {
                let done = party.run(shipment.step(name)).await.unwrap();
                assert_eq!((done.is_replay(), *done.value()), (is_replay, value), "{name}");
            }
        }
        // Another list of the outer job is another list for the nested job, too.
        let mut renamed = once(store, "order-1").steps();
        drop(renamed.step("book"));
        let ended = party.run(renamed.step("ship").steps().step("reserve")).await;
        assert!(
            matches!(ended, Err(OnceError::StepChanged { position: 0 })),
            "{ended:?}"
        );
        assert_eq!(party.effects(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_step_follows_its_own_setting_and_has_its_own_id() {
        let (party, store) = (Party::default(), RemoteStore::new());
        let mut steps = once(store.clone(), "order-1").with_input("three shirts").steps();
        party.run(steps.step("draft")).await.unwrap();
        party.fail(steps.step("confirm"), unknown()).await.unwrap_err();

        let ids = Arc::new(Mutex::new(Vec::new()));
        let mut steps = once(store.clone(), "order-1").with_input("three shirts").steps();
        assert!(party.run(steps.step("draft")).await.unwrap().is_replay());
        let seen = Arc::clone(&ids);
        let confirm = steps
            .step("confirm")
            .at_least_once()
            .run(|attempt: Attempt| async move {
                seen.lock().unwrap().push(attempt.id("call"));
                Ok::<_, Failure<String>>(attempt.number())
            });
        assert_eq!(confirm.await.unwrap().into_value(), 2);
        let seen = Arc::clone(&ids);
        let next = steps.step("receipt").run(|attempt: Attempt| async move {
            seen.lock().unwrap().push(attempt.id("call"));
            Ok::<_, Failure<String>>(attempt.number())
        });
        next.await.unwrap();
        {
            let ids = ids.lock().unwrap();
            assert_ne!(ids[0], ids[1]);
        }
        // A step with another input belongs to another job.
        let mut other = once(store, "order-1").with_input("four shirts").steps();
        assert!(matches!(
            party.run(other.step("draft")).await,
            Err(OnceError::StepChanged { position: 0 })
        ));
    }
}
