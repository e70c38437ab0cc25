//! The operations of a store in their variants: every kind of claim, outcome and resolution.

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StorageKey, StoredResponse,
};
use tower_idempotency::{Error, ErrorKind, Store};

const HOUR: Duration = Duration::from_secs(3_600);

/// An operation on a key that is in the state that the operation needs.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Claims a free key for this lease.
    Claim(Duration),
    /// Claims a key whose owner is lost.
    TakeOver(IfLost),
    Complete(Outcome),
    Peek,
    /// Releases a key whose owner has this attempt.
    Release(u32),
    Renew(Duration),
    /// Resolves a key whose owner is lost.
    Resolve(Resolution),
    Watch,
}

#[derive(Debug, PartialEq)]
pub enum Reply {
    Claim(Decision),
    Complete(Completion),
    Peek(Option<Snapshot>),
    Release(Release),
    Renew(Renewal),
    Resolve(ResolveResult),
    Watch,
}

pub fn outcomes() -> [Outcome; 3] {
    let response = StoredResponse {
        head: Bytes::from_static(b"head"),
        body: Bytes::from_static(b"body"),
    };
    [Outcome::Stored(response), Outcome::Tombstone, Outcome::Rejected]
}

impl Operation {
    /// Returns one operation of each kind.
    pub fn kinds() -> Vec<Self> {
        let [stored, ..] = outcomes();
        vec![
            Self::Claim(HOUR),
            Self::Complete(stored.clone()),
            Self::Peek,
            Self::Release(1),
            Self::Renew(2 * HOUR),
            Self::Resolve(Resolution::Completed(stored, HOUR)),
            Self::Watch,
        ]
    }

    /// Returns the other operations.
    pub fn variants() -> Vec<Self> {
        let mut variants = vec![
            Self::Claim(Duration::ZERO),
            Self::Release(2),
            Self::Renew(Duration::ZERO),
            Self::Resolve(Resolution::Absent),
        ];
        variants.extend([IfLost::Execute, IfLost::Recover, IfLost::Refuse].map(Self::TakeOver));
        for outcome in [Outcome::Tombstone, Outcome::Rejected] {
            variants.push(Self::Resolve(Resolution::Completed(outcome.clone(), HOUR)));
            variants.push(Self::Complete(outcome));
        }
        variants
    }

    pub fn all() -> Vec<Self> {
        [Self::kinds(), Self::variants()].concat()
    }
}

/// An operation on a key of its own.
#[derive(Debug)]
pub struct Case {
    pub operation: Operation,
    /// The claim that the operation makes, or the claim of the owner.
    pub claim: Claim,
    /// The owner before the operation.
    owner: Option<Owner>,
}

impl Case {
    /// Brings a new key into the state that the operation needs.
    pub async fn new(operation: &Operation, store: &impl Store) -> Self {
        let attempts = match operation {
            Operation::Claim(_) => 0,
            Operation::Release(attempts) => *attempts,
            _ => 1,
        };
        let mut claim = Claim {
            key: StorageKey::from_bytes(rand::random()),
            fingerprint: Fingerprint::of(b"pay"),
            nonce: Nonce::random(),
            lease: HOUR,
            retention: HOUR,
            if_lost: IfLost::Execute,
            max_attempts: 9,
        };
        let mut owner = None;
        for _ in 0..attempts {
            if let Some(owner) = owner {
                store.renew(&claim.key, owner, Duration::ZERO).await.unwrap();
            }
            claim.nonce = Nonce::random();
            owner = Some(granted(store, &claim).await.owner);
        }
        if let (Operation::TakeOver(_) | Operation::Resolve(_), Some(owner)) = (operation, owner) {
            store.renew(&claim.key, owner, Duration::ZERO).await.unwrap();
        }
        match operation {
            Operation::Claim(lease) => claim.lease = *lease,
            Operation::TakeOver(if_lost) => (claim.if_lost, claim.nonce) = (*if_lost, Nonce::random()),
            _ => {}
        }
        Self {
            operation: operation.clone(),
            claim,
            owner,
        }
    }

    fn owner(&self) -> Owner {
        self.owner.expect("an earlier claim was granted")
    }

    pub async fn run(&self, store: &impl Store) -> Result<Reply, Error> {
        let key = &self.claim.key;
        Ok(match &self.operation {
            Operation::Claim(_) | Operation::TakeOver(_) => Reply::Claim(store.claim(&self.claim).await?),
            Operation::Complete(outcome) => Reply::Complete(store.complete(key, self.owner(), outcome, HOUR).await?),
            Operation::Peek => Reply::Peek(store.peek(key).await?),
            Operation::Release(_) => Reply::Release(store.release(key, self.owner()).await?),
            Operation::Renew(lease) => Reply::Renew(store.renew(key, self.owner(), *lease).await?),
            Operation::Resolve(resolution) => Reply::Resolve(store.resolve(key, self.owner().fence, resolution).await?),
            Operation::Watch => store.watch(key).await.map(|_| Reply::Watch)?,
        })
    }

    /// Whether a look at the record shows the effect of the operation.
    pub async fn has_effect(&self, store: &impl Store) -> bool {
        let seen = store.peek(&self.claim.key).await.unwrap();
        let nonce = seen.as_ref().map(|seen| seen.nonce);
        let status = seen.map(|seen| seen.status);
        match &self.operation {
            Operation::Claim(_) | Operation::TakeOver(IfLost::Execute | IfLost::Recover) => {
                nonce == Some(self.claim.nonce)
            }
            Operation::TakeOver(IfLost::Refuse) => status == Some(Status::Unknown),
            Operation::Complete(Outcome::Rejected)
            | Operation::Resolve(Resolution::Completed(Outcome::Rejected, _)) => status == Some(Status::Unknown),
            Operation::Complete(outcome) | Operation::Resolve(Resolution::Completed(outcome, _)) => {
                status == Some(Status::Completed(outcome.clone()))
            }
            Operation::Release(1) | Operation::Resolve(Resolution::Absent) => status.is_none(),
            Operation::Release(_) | Operation::Renew(Duration::ZERO) => status == Some(Status::Lost),
            Operation::Renew(_) => matches!(status, Some(Status::InFlight { left }) if left > HOUR),
            Operation::Peek | Operation::Watch => true,
        }
    }

    /// Checks the reply to the operation. `is_repeat` tells whether an earlier copy of the operation
    /// may have taken effect.
    pub fn check(&self, reply: &Reply, is_repeat: bool) {
        let fence = self.owner.map(|owner| owner.fence);
        let is_right = match (&self.operation, reply) {
            (Operation::Claim(_) | Operation::TakeOver(IfLost::Execute), Reply::Claim(Decision::Execute(grant)))
            | (Operation::TakeOver(IfLost::Recover), Reply::Claim(Decision::Recover(grant))) => {
                let attempt = if fence.is_some() { 2 } else { 1 };
                grant.owner.nonce == self.claim.nonce && grant.attempt == attempt && Some(grant.owner.fence) > fence
            }
            (Operation::Peek, Reply::Peek(seen)) => seen.as_ref().map(|seen| seen.fence) == fence,
            (Operation::Resolve(_), Reply::Resolve(ResolveResult::Conflict(_))) => is_repeat,
            (Operation::TakeOver(IfLost::Refuse), Reply::Claim(Decision::Unknown))
            | (Operation::Complete(_), Reply::Complete(Completion::Completed))
            | (Operation::Release(_), Reply::Release(Release::Released))
            | (Operation::Renew(_), Reply::Renew(Renewal::Renewed))
            | (Operation::Resolve(_), Reply::Resolve(ResolveResult::Resolved))
            | (Operation::Watch, Reply::Watch) => true,
            _ => false,
        };
        assert!(is_right, "{:?}: {reply:?}", self.operation);
    }

    /// Repeats an operation that may have taken effect, as its caller does. `first` is the reply to
    /// the first copy, if it came. Then checks the decision about a claim with another nonce.
    pub async fn repeat(&self, first: Option<&Reply>, store: &impl Store) {
        let reply = self.run(store).await.unwrap();
        self.check(&reply, true);
        if let Some(first @ Reply::Claim(_)) = first {
            assert_eq!(*first, reply, "{:?}", self.operation);
        }
        let decision = store.claim(&self.other()).await.unwrap();
        let attempt = match &decision {
            Decision::Execute(grant) => Some(grant.attempt),
            _ => None,
        };
        let is_right = match &self.operation {
            Operation::Complete(outcome) | Operation::Resolve(Resolution::Completed(outcome, _)) => {
                decision == decision_about(outcome)
            }
            Operation::TakeOver(IfLost::Refuse) => decision == Decision::Unknown,
            Operation::Release(attempts) if *attempts > 1 => attempt == Some(attempts + 1),
            Operation::Release(_) | Operation::Resolve(Resolution::Absent) => attempt == Some(1),
            Operation::Claim(Duration::ZERO) | Operation::Renew(Duration::ZERO) => attempt == Some(2),
            _ => matches!(decision, Decision::Wait { .. }),
        };
        assert!(is_right, "after {:?}: {decision:?}", self.operation);
    }

    /// Repeats the operation on a store, as its caller does, until the store can be reached.
    pub async fn repeat_until_it_succeeds(&self, store: &impl Store) -> Reply {
        for _ in 0..400 {
            match self.run(store).await {
                Ok(reply) => {
                    self.check(&reply, true);
                    return reply;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?} never succeeds", self.operation);
    }

    /// Returns a claim of another caller.
    pub fn other(&self) -> Claim {
        Claim {
            nonce: Nonce::random(),
            lease: HOUR,
            if_lost: IfLost::Execute,
            ..self.claim.clone()
        }
    }
}

pub async fn granted(store: &impl Store, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("the claim is not granted: {other:?}"),
    }
}

/// The decision about each claim of a key with this outcome.
pub fn decision_about(outcome: &Outcome) -> Decision {
    match outcome {
        Outcome::Stored(response) => Decision::Replay(response.clone()),
        Outcome::Tombstone => Decision::NotStored,
        Outcome::Rejected => Decision::Unknown,
    }
}
