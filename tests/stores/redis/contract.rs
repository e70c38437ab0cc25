//! The contract, clause by clause.

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, IfLost, Outcome, Release, Renewal, Status,
};
use tower_idempotency::{ErrorKind, RedisStore, Store};

use super::{HOUR, RedisServer, claim, completed, connect, granted, name, replayed, stored};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_one_of_64_concurrent_claims_is_granted() {
    let server = RedisServer::start();
    let stores = [connect(&server).await, connect(&server).await];
    for key in 0..50 {
        let claims = (0..64).map(|nonce: u8| {
            let store = stores[usize::from(nonce % 2)].clone();
            tokio::spawn(async move { store.claim(&claim(key, nonce)).await.unwrap() })
        });
        let decisions = futures::future::join_all(claims).await;
        let granted = decisions
            .iter()
            .filter(|decision| matches!(decision, Ok(Decision::Execute(_))));
        assert_eq!(granted.count(), 1);
    }
}

#[tokio::test]
async fn lease_and_retention_end_by_the_servers_clock() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let short = Duration::from_millis(300);
    let first = Claim {
        lease: short,
        if_lost: IfLost::Execute,
        ..claim(1, 1)
    };
    let second = Claim {
        if_lost: IfLost::Execute,
        ..claim(1, 2)
    };
    let lost = granted(&store, &first).await;
    assert!(matches!(store.claim(&second).await.unwrap(), Decision::Wait { left } if left <= short && !left.is_zero()));
    tokio::time::sleep(short).await;
    assert_eq!(store.peek(&first.key).await.unwrap().unwrap().status, Status::Lost);
    let grant = granted(&store, &second).await;
    assert_eq!((grant.attempt, grant.owner.fence > lost.owner.fence), (2, true));
    assert_eq!(
        store.renew(&first.key, lost.owner, HOUR).await.unwrap(),
        Renewal::Superseded
    );
    store
        .complete(&first.key, grant.owner, &stored("a"), short)
        .await
        .unwrap();
    assert_eq!(replayed(&store, 1).await.body, "a");
    tokio::time::sleep(short).await;
    // The record decides, although Redis still has the key.
    assert_eq!(server.command::<u64>(&format!("EXISTS {}", name(1))), 1);
    assert_eq!(store.peek(&first.key).await.unwrap(), None);
    assert_eq!(granted(&store, &second).await.attempt, 1);
}

#[tokio::test]
async fn redis_forgets_a_record_soon_after_it_expired() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let grant = granted(&store, &claim(1, 1)).await;
    let left: u64 = server.command(&format!("PTTL {}", name(1)));
    assert!((7_200_000..=7_202_000).contains(&left), "{left}");
    store
        .complete(&claim(1, 1).key, grant.owner, &Outcome::Tombstone, Duration::ZERO)
        .await
        .unwrap();
    let left: u64 = server.command(&format!("PTTL {}", name(1)));
    assert!((1..=2_000).contains(&left), "{left}");
}

#[tokio::test]
async fn large_responses_come_back_byte_for_byte() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let body: Vec<u8> = (0..2 << 20)
        .map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let grant = granted(&store, &claim(1, 1)).await;
    let outcome = stored(body.clone());
    store
        .complete(&claim(1, 1).key, grant.owner, &outcome, HOUR)
        .await
        .unwrap();
    assert!(replayed(&store, 1).await.body == body);
    assert_eq!(
        store.peek(&claim(1, 1).key).await.unwrap().unwrap().status,
        Status::Completed(outcome)
    );
}

#[tokio::test]
async fn empty_and_binary_responses_differ_from_tombstones() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let all: Bytes = (0..=255).collect();
    for (key, outcome) in [
        (1, stored("")),
        (2, stored(all)),
        (3, Outcome::Stored(Default::default())),
        (4, Outcome::Tombstone),
    ] {
        let grant = granted(&store, &claim(key, 1)).await;
        store
            .complete(&claim(key, 1).key, grant.owner, &outcome, HOUR)
            .await
            .unwrap();
        let status = store.peek(&claim(key, 1).key).await.unwrap().unwrap().status;
        assert_eq!(status, Status::Completed(outcome));
    }
    assert_eq!(store.claim(&claim(4, 9)).await.unwrap(), Decision::NotStored);
}

#[tokio::test]
async fn a_repeated_claim_gets_the_same_grant_of_the_same_kind() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let lost = granted(&store, &claim(1, 1)).await;
    assert_eq!(granted(&store, &claim(1, 1)).await, lost);
    store.renew(&claim(1, 1).key, lost.owner, Duration::ZERO).await.unwrap();
    let recovering = Claim {
        if_lost: IfLost::Recover,
        ..claim(1, 2)
    };
    let grant = store.claim(&recovering).await.unwrap();
    assert!(matches!(grant, Decision::Recover(_)), "{grant:?}");
    let other_mind = Claim {
        if_lost: IfLost::Execute,
        ..recovering
    };
    assert_eq!(store.claim(&other_mind).await.unwrap(), grant);
}

/// Tries every operation on an unreadable record. None may change it.
async fn refuses_everything(store: &RedisStore, key: u8) {
    let asked = claim(key, 1);
    let grant = granted(store, &claim(200, 1)).await;
    let fence = grant.owner.fence;
    let absent = tower_idempotency::protocol::Resolution::Absent;
    let errors = [
        store.claim(&asked).await.unwrap_err(),
        store.renew(&asked.key, grant.owner, HOUR).await.unwrap_err(),
        store
            .complete(&asked.key, grant.owner, &stored("a"), HOUR)
            .await
            .unwrap_err(),
        store.release(&asked.key, grant.owner).await.unwrap_err(),
        store.resolve(&asked.key, fence, &absent).await.unwrap_err(),
        store.peek(&asked.key).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::CorruptRecord, "{error}");
    }
}

#[tokio::test]
async fn an_unreadable_record_is_never_absent_and_never_overwritten() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    completed(&store, 1, "body").await;
    let sound: Vec<u8> = server.command(&format!("GET {}", name(1)));
    granted(&store, &claim(2, 1)).await;
    let open: Vec<u8> = server.command(&format!("GET {}", name(2)));
    let mut values: Vec<Vec<u8>> = vec![Vec::new(), b"x".to_vec(), sound[..95].to_vec(), sound[..98].to_vec()];
    for (index, byte) in [(0, 2), (0, 0), (1, 4), (1, 2), (2, 2), (99, 200)] {
        let mut damaged = sound.clone();
        damaged[index] = byte;
        values.push(damaged);
    }
    // An open record with extra bytes at its end, and one whose lease has an end that it should not
    // have.
    values.push([&open[..], b"rest"].concat());
    values.push([&open[..1], &[1], &open[2..]].concat());
    // A completed record whose lease has an end, and one whose head is longer than all of its bytes.
    // A fence that Lua cannot hold exactly. A later state.
    let longer = u8::try_from(sound.len() - 100 + 1).unwrap();
    for (record, changes) in [
        (&sound, vec![(80, 1)]),
        (&sound, vec![(96, longer)]),
        (&open, vec![(59, 1)]),
        (&open, [(1, 4)].into_iter().chain((80..88).map(|at| (at, 0))).collect()),
    ] {
        let mut damaged = record.clone();
        for (index, byte) in changes {
            damaged[index] = byte;
        }
        values.push(damaged);
    }
    for (n, value) in (10_u8..).zip(values) {
        let key = name(n);
        server.run::<()>(redis::cmd("SET").arg(&key).arg(&value));
        refuses_everything(&store, n).await;
        assert_eq!(server.run::<Vec<u8>>(redis::cmd("GET").arg(&key)), value, "{n}");
    }
    server.command::<()>(&format!("RPUSH {} a", name(9)));
    refuses_everything(&store, 9).await;
    assert_eq!(server.command::<String>(&format!("TYPE {}", name(9))), "list");
}

#[tokio::test]
async fn another_fingerprint_is_a_mismatch_in_every_state() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let other = Claim {
        fingerprint: Fingerprint::of(b"other"),
        ..claim(1, 2)
    };
    let grant = granted(&store, &claim(1, 1)).await;
    assert_eq!(store.claim(&other).await.unwrap(), Decision::Mismatch);
    store
        .renew(&claim(1, 1).key, grant.owner, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(store.claim(&other).await.unwrap(), Decision::Mismatch);
    store
        .complete(&claim(1, 1).key, grant.owner, &stored("a"), HOUR)
        .await
        .unwrap();
    assert_eq!(store.claim(&other).await.unwrap(), Decision::Mismatch);
}

#[tokio::test]
async fn the_longest_times_are_capped_and_stay_exact() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let endless = Claim {
        lease: Duration::MAX,
        retention: Duration::MAX,
        ..claim(1, 1)
    };
    let grant = granted(&store, &endless).await;
    assert_eq!(grant.lease, Some(Duration::from_secs(100 * 365 * 86_400)));
    assert!(matches!(
        store.claim(&claim(1, 2)).await.unwrap(),
        Decision::Wait { .. }
    ));
    let done = store
        .complete(&endless.key, grant.owner, &stored("a"), Duration::MAX)
        .await
        .unwrap();
    assert_eq!(done, Completion::Completed);
    assert_eq!(replayed(&store, 1).await.body, "a");
}

#[tokio::test]
async fn a_completion_whose_future_is_dropped_is_still_sent() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let key = claim(1, 1).key;
    let grant = granted(&store, &claim(1, 1)).await;
    let outcome = stored("a");
    {
        let mut completion = std::pin::pin!(store.complete(&key, grant.owner, &outcome, HOUR));
        assert!(futures::poll!(completion.as_mut()).is_pending());
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(replayed(&store, 1).await.body, "a");

    let other = claim(2, 1).key;
    let grant = granted(&store, &claim(2, 1)).await;
    {
        let mut release = std::pin::pin!(store.release(&other, grant.owner));
        assert!(futures::poll!(release.as_mut()).is_pending());
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(store.peek(&claim(2, 1).key).await.unwrap(), None);
    assert_eq!(
        store.release(&claim(2, 1).key, grant.owner).await.unwrap(),
        Release::Released
    );
}

/// A waiter that is woken looks at the record again, so it must not wake at each renewal.
#[tokio::test]
async fn a_watch_sleeps_while_the_owner_renews_its_lease() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let grant = granted(&store, &claim(1, 1)).await;
    let key = claim(1, 1).key;
    let mut watch = Box::pin(store.watch(&key).await.unwrap());
    store.renew(&key, grant.owner, HOUR).await.unwrap();
    assert_eq!(granted(&store, &claim(1, 1)).await, grant);
    // The server sends a message before all later replies on the same connection.
    store.peek(&key).await.unwrap();
    assert!(futures::poll!(&mut watch).is_pending());
    store.release(&key, grant.owner).await.unwrap();
    watch.await;
}

#[tokio::test]
async fn a_watch_wakes_at_every_change_that_matters_in_another_store_and_in_its_own() {
    let server = RedisServer::start();
    let (here, there) = (connect(&server).await, connect(&server).await);
    for (key, change) in [
        (1, "complete"),
        (2, "release"),
        (3, "give up"),
        (4, "take over"),
        (5, "resolve"),
        (6, "unknown"),
    ] {
        let asked = Claim {
            if_lost: IfLost::Execute,
            ..claim(key, 1)
        };
        let grant = granted(&there, &asked).await;
        if key > 3 {
            there.renew(&asked.key, grant.owner, Duration::ZERO).await.unwrap();
        }
        let mut watches = Vec::new();
        for store in [&here, &there, &here] {
            watches.push(Box::pin(store.watch(&asked.key).await.unwrap()));
        }
        for watch in &mut watches {
            assert!(futures::poll!(watch).is_pending(), "{change}");
        }
        match change {
            "complete" => drop(
                there
                    .complete(&asked.key, grant.owner, &stored("a"), HOUR)
                    .await
                    .unwrap(),
            ),
            "release" => drop(there.release(&asked.key, grant.owner).await.unwrap()),
            "give up" => drop(there.renew(&asked.key, grant.owner, Duration::ZERO).await.unwrap()),
            "take over" => drop(
                granted(
                    &there,
                    &Claim {
                        nonce: claim(1, 2).nonce,
                        ..asked
                    },
                )
                .await,
            ),
            "unknown" => assert_eq!(there.claim(&claim(key, 3)).await.unwrap(), Decision::Unknown),
            _ => {
                let absent = tower_idempotency::protocol::Resolution::Absent;
                there.resolve(&asked.key, grant.owner.fence, &absent).await.unwrap();
            }
        }
        let all = futures::future::join_all(watches);
        tokio::time::timeout(Duration::from_secs(2), all).await.expect(change);
    }
}

/// A waiter that leaves while the server takes its subscription.
#[tokio::test]
async fn a_watch_that_is_dropped_while_it_subscribes_leaves_no_channel() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let channels = || server.command::<Vec<String>>("PUBSUB SHARDCHANNELS");
    let key = claim(1, 1).key;
    server.signal("-STOP");
    let subscribing = tokio::time::timeout(Duration::from_millis(200), store.watch(&key));
    assert!(subscribing.await.is_err());
    server.signal("-CONT");
    for watches in 0..2 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(channels(), [""; 0], "after {watches} other watches");
        drop(store.watch(&key).await.unwrap());
    }
}

#[tokio::test]
async fn the_last_watch_unsubscribes_and_a_new_one_at_that_moment_is_not_lost() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let channels = || server.command::<Vec<String>>("PUBSUB SHARDCHANNELS");
    let key = claim(1, 1).key;
    let (one, two) = (store.watch(&key).await.unwrap(), store.watch(&key).await.unwrap());
    assert_eq!(server.calls("ssubscribe"), 1);
    assert_eq!(channels(), [name(1)]);
    drop(one);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(channels().len(), 1);
    drop(two);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(channels().len(), 0);
    // The unsubscription of one watch and the subscription of the next cross each other. The next
    // watch still wakes.
    for n in 0..100_u8 {
        let asked = claim(n, 1);
        let grant = granted(&store, &asked).await;
        drop(store.watch(&asked.key).await.unwrap());
        let watch = store.watch(&asked.key).await.unwrap();
        store
            .complete(&asked.key, grant.owner, &stored("a"), HOUR)
            .await
            .unwrap();
        tokio::time::timeout(Duration::from_secs(2), watch).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(channels().len(), 0);
}
