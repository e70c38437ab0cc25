//! The store in PostgreSQL, against servers of each test's own.

#[path = "support/postgres.rs"]
mod postgres;

use std::time::Duration;

use bytes::Bytes;
use postgres::PostgresServer;
use tower_idempotency::protocol::{
    Answer, Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Release, Renewal, Resolution,
    Resolved, Status, StorageKey,
};
use tower_idempotency::{PostgresStore, Store};

const HOUR: Duration = Duration::from_secs(3_600);

fn claim(key: u8) -> Claim {
    Claim {
        key: StorageKey::from_bytes([key; 32]),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::random(),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

fn kept(body: &[u8]) -> Outcome {
    Outcome::Kept(Answer {
        head: Bytes::from_static(b"head"),
        body: Bytes::copy_from_slice(body),
    })
}

async fn granted(store: &PostgresStore, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_lives_its_life() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let first = claim(1);
    let grant = granted(&store, &first).await;
    assert_eq!((grant.attempt, grant.lease), (1, Some(HOUR)));
    assert_eq!(store.claim(&first).await.unwrap(), Decision::Execute(grant));
    assert!(matches!(store.claim(&claim(1)).await.unwrap(), Decision::Wait { left } if left <= HOUR));
    let other = Claim {
        fingerprint: Fingerprint::of(b"refund"),
        ..claim(1)
    };
    assert_eq!(store.claim(&other).await.unwrap(), Decision::Mismatch);
    let key = &first.key;
    assert_eq!(store.renew(key, grant.owner, HOUR).await.unwrap(), Renewal::Renewed);
    assert_eq!(
        store.renew(key, grant.owner, Duration::ZERO).await.unwrap(),
        Renewal::Renewed
    );
    let snapshot = store.peek(key).await.unwrap().unwrap();
    assert_eq!(snapshot.status, Status::Lost);
    let second = Claim {
        if_lost: IfLost::Recover,
        ..claim(1)
    };
    let Decision::Recover(taken) = store.claim(&second).await.unwrap() else {
        panic!("not taken over")
    };
    assert!(taken.owner.fence > grant.owner.fence);
    assert_eq!(taken.attempt, 2);
    assert_eq!(
        store.complete(key, grant.owner, &kept(b"late"), HOUR).await.unwrap(),
        Completion::Superseded(None)
    );
    assert_eq!(
        store.complete(key, taken.owner, &kept(b"paid"), HOUR).await.unwrap(),
        Completion::Completed
    );
    assert_eq!(
        store.complete(key, taken.owner, &kept(b"again"), HOUR).await.unwrap(),
        Completion::Completed
    );
    assert_eq!(
        store.complete(key, grant.owner, &kept(b"late"), HOUR).await.unwrap(),
        Completion::Superseded(Some(kept(b"paid")))
    );
    let Decision::Replay(answer) = store.claim(&claim(1)).await.unwrap() else {
        panic!("not replayed")
    };
    assert_eq!(kept(b"paid"), Outcome::Kept(answer));
    assert_eq!(store.release(key, taken.owner).await.unwrap(), Release::Superseded);
    assert!(matches!(
        store
            .resolve(key, taken.owner.fence, &Resolution::Absent)
            .await
            .unwrap(),
        Resolved::Conflict(Some(_))
    ));
}
