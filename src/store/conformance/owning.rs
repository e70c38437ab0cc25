//! Clauses about owners and outcomes: 7, 9, 11 and 12.

use bytes::Bytes;

use super::probe::{kept, random, Probe, IN_FLIGHT, LEASE, RETENTION, WAIT};
use crate::protocol::{
    Answer, Completion, Decision, Fence, IfLost, Nonce, Outcome, Owner, Release, Renewal, Resolution, Resolved,
    Snapshot, Status,
};
use crate::store::Store;

/// Clause 7: `renew`, `complete` and `release` compare nonce *and* fence, and do nothing for anybody else.
///
/// Checked with the owner's nonce and another fence, its fence and another nonce, and both of an owner that was superseded;
/// in flight, lost, unknown, completed and absent.
pub async fn owners_only<S: Store>(store: &S) {
    const CLAUSE: &str = "7 (owners only)";
    let outcome = kept("head", "what stands");
    for at in 0..5 {
        let probe = Probe::new(store, CLAUSE);
        let (owner, stands) = match at {
            0 => (probe.first().await, None),
            1 => (probe.lost().await, None),
            2 => (probe.unknown().await, None),
            3 => (probe.completed(&outcome).await, Some(outcome.clone())),
            _ => (probe.completed(&Outcome::Tombstone).await, Some(Outcome::Tombstone)),
        };
        for stranger in strangers(owner) {
            turns_away(&probe, stranger, stands.clone()).await;
        }
        if stands.is_some() {
            ended(&probe, owner).await;
        }
    }
    superseded(&Probe::new(store, CLAUSE)).await;
    absent(&Probe::new(store, CLAUSE)).await;
}

fn strangers(owner: Owner) -> [Owner; 4] {
    let (nonce, fence) = (owner.nonce, owner.fence.as_u64());
    [
        Owner {
            nonce: Nonce::random(),
            ..owner
        },
        Owner {
            nonce,
            fence: Fence::new(fence.wrapping_add(1)),
        },
        Owner {
            nonce,
            fence: Fence::new(fence.wrapping_sub(1)),
        },
        Owner {
            nonce: Nonce::random(),
            fence: Fence::new(fence.wrapping_add(1)),
        },
    ]
}

async fn turns_away<S: Store>(probe: &Probe<'_, S>, stranger: Owner, stands: Option<Outcome>) {
    let before = probe.look().await;
    let case = probe.case;
    let unchanged = |operation: &str, after: Option<Snapshot>| {
        case.same(&format!("the record after a stranger's {operation}"), &after, &before);
    };
    for lease in [LEASE, std::time::Duration::ZERO] {
        let renewal = probe.renew(stranger, lease).await;
        case.same("a stranger's renewal", &renewal, &Renewal::Superseded);
        unchanged("renewal", probe.look().await);
    }
    let completion = probe.complete(stranger, &kept("head", "a stranger's")).await;
    case.same("a stranger's completion", &completion, &Completion::Superseded(stands));
    unchanged("completion", probe.look().await);
    let release = probe.release(stranger).await;
    case.same("a stranger's release", &release, &Release::Superseded);
    unchanged("release", probe.look().await);
}

/// Who has completed is no owner any more, but for a repeated completion.
async fn ended<S: Store>(probe: &Probe<'_, S>, owner: Owner) {
    let before = probe.look().await;
    let renewal = probe.renew(owner, LEASE).await;
    probe
        .case
        .same("a renewal after completion", &renewal, &Renewal::Superseded);
    let release = probe.release(owner).await;
    probe
        .case
        .same("a release after completion", &release, &Release::Superseded);
    let what = "the record after renewal and release of what is completed";
    probe.case.same(what, &probe.look().await, &before);
}

async fn superseded<S: Store>(probe: &Probe<'_, S>) {
    let first = probe.lost().await;
    let second = probe.taken_over().await;
    turns_away(probe, first, None).await;
    let outcome = kept("head", "the second's");
    let completion = probe.complete(second, &outcome).await;
    probe
        .case
        .same("the owner completes", &completion, &Completion::Completed);
    turns_away(probe, first, Some(outcome)).await;
}

async fn absent<S: Store>(probe: &Probe<'_, S>) {
    let nobody = Owner {
        nonce: Nonce::random(),
        fence: Fence::new(1),
    };
    let renewal = probe.renew(nobody, LEASE).await;
    probe.case.same("a renewal of nothing", &renewal, &Renewal::Superseded);
    let completion = probe.complete(nobody, &kept("head", "body")).await;
    probe
        .case
        .same("a completion of nothing", &completion, &Completion::Superseded(None));
    let release = probe.release(nobody).await;
    probe.case.same("a release of nothing", &release, &Release::Released);
    probe
        .case
        .same("what they leave where nothing was", &probe.look().await, &None);
}

/// Clause 9: a release leaves evidence; it deletes the record only when the owner's attempt was the only one ever.
///
/// Checked in flight, lost and unknown; for the first attempt, and for later ones, released once and repeatedly.
pub async fn release_leaves_evidence<S: Store>(store: &S) {
    const CLAUSE: &str = "9 (a release leaves evidence)";
    for at in 0..3 {
        let probe = Probe::new(store, CLAUSE);
        let owner = match at {
            0 => probe.first().await,
            1 => probe.lost().await,
            _ => probe.unknown().await,
        };
        for what in ["the release of an only attempt", "its repetition"] {
            probe.case.same(what, &probe.release(owner).await, &Release::Released);
            let what = format!("the record after {what}");
            probe.case.same(&what, &probe.look().await, &None);
        }
        let grant = probe.granted(&probe.case.claim(IfLost::Refuse)).await;
        let what = "the number of the first attempt after a release";
        probe.case.same(what, &grant.attempt, &1);
    }
    for lost in [false, true] {
        later_attempt(&Probe::new(store, CLAUSE), lost).await;
    }
}

async fn later_attempt<S: Store>(probe: &Probe<'_, S>, lost: bool) {
    probe.lost().await;
    let second = probe.taken_over().await;
    if lost {
        probe.lose(second).await;
    }
    for what in ["the release of a second attempt", "its repetition"] {
        probe.case.same(what, &probe.release(second).await, &Release::Released);
        let what = format!("the status after {what}");
        probe.case.same(&what, &probe.status().await, &Some(Status::Lost));
    }
    let decision = probe.ask(&probe.case.claim(IfLost::Refuse)).await;
    let what = "a claim that refuses to repeat, after the release of a second attempt";
    probe.case.same(what, &decision, &Decision::Unknown);
    let release = probe.release(second).await;
    probe
        .case
        .same("a release of the unknown", &release, &Release::Released);
    let what = "the status of the unknown after a release";
    probe.case.same(what, &probe.status().await, &Some(Status::Unknown));
}

/// Clause 11: the last owner of a lost or unknown record can still complete it; so can whoever resolves it by its fence.
///
/// Checked that the outcome is replayed from then on, and that a live owner's record resolves for nobody.
pub async fn late_completions_heal<S: Store>(store: &S) {
    const CLAUSE: &str = "11 (late completions heal)";
    let outcome = kept("head", "late");
    for unknown in [false, true] {
        for resolves in [false, true] {
            let probe = Probe::new(store, CLAUSE);
            let owner = if unknown {
                probe.unknown().await
            } else {
                probe.lost().await
            };
            if resolves {
                let resolution = Resolution::Completed(outcome.clone(), RETENTION);
                let resolved = probe.resolve(owner.fence, &resolution).await;
                probe.case.same("a resolution", &resolved, &Resolved::Resolved);
            } else {
                let completion = probe.complete(owner, &outcome).await;
                let what = "a late completion by the last owner";
                probe.case.same(what, &completion, &Completion::Completed);
            }
            replays(&probe, &outcome).await;
        }
    }
    let probe = Probe::new(store, CLAUSE);
    let owner = probe.first().await;
    let resolved = probe.resolve(owner.fence, &Resolution::Absent).await;
    let what = "a resolution while the owner is alive";
    probe.case.same(what, &resolved, &Resolved::Conflict(Some(owner.fence)));
    probe.case.same(what, &probe.status().await, &Some(IN_FLIGHT));
    let decision = probe.ask(&probe.case.claim(IfLost::Execute)).await;
    probe.case.same("a claim while the owner is alive", &decision, &WAIT);
}

/// Clause 12: what is read back equals what was completed, byte for byte.
///
/// Checked with empty answers, every byte value, whitespace at the ends, text that is not UTF-8, and 128 KiB at random; by
/// `claim`, `claim_now`, `peek` and the completion of a superseded owner. No more is kept at a time than a store with room
/// for 1 MiB of answers holds.
pub async fn exact_answers<S: Store>(store: &S) {
    const CLAUSE: &str = "12 (exact answers)";
    let every: Bytes = (0..=u8::MAX).collect();
    let answers = [
        kept("", ""),
        kept("", "no head"),
        kept("no body", ""),
        kept(every.clone(), every.slice(..).iter().rev().copied().collect::<Bytes>()),
        kept(" \r\n\0", "\0\n\t \r\n"),
        kept("3", "-0001.50"),
        kept(b"\xff\xfe".to_vec(), b"\xc3\x28 \xf0\x28\x8c\xbc".to_vec()),
        kept(random::<4096>().to_vec(), every.repeat(512)),
        kept("head", (0..32).flat_map(|_| random::<4096>()).collect::<Bytes>()),
    ];
    for outcome in answers {
        for probe in Probe::both_ways(store, CLAUSE) {
            probe.completed(&outcome).await;
            replays(&probe, &outcome).await;
        }
    }
    let probe = Probe::new(store, CLAUSE);
    probe.completed(&Outcome::Tombstone).await;
    replays(&probe, &Outcome::Tombstone).await;
}

/// Everybody who asks gets the outcome.
pub(super) async fn replays<S: Store>(probe: &Probe<'_, S>, outcome: &Outcome) {
    let decision = match probe.ask(&probe.case.claim(IfLost::Execute)).await {
        Decision::Replay(answer) => Some(Outcome::Kept(answer)),
        Decision::NotKept => Some(Outcome::Tombstone),
        other => probe.case.fail(&format!("a claim of what is completed got {other:?}")),
    };
    equal(probe, "claim", decision.as_ref(), outcome);
    let shown = match probe.status().await {
        Some(Status::Completed(outcome)) => Some(outcome),
        other => probe
            .case
            .fail(&format!("`peek` showed {other:?} for what is completed")),
    };
    equal(probe, "peek", shown.as_ref(), outcome);
    let nobody = Owner {
        nonce: Nonce::random(),
        fence: Fence::new(1),
    };
    let stands = match probe.complete(nobody, &Outcome::Tombstone).await {
        Completion::Superseded(stands) => stands,
        other @ Completion::Completed => probe.case.fail(&format!("a stranger's completion got {other:?}")),
    };
    equal(probe, "complete", stands.as_ref(), outcome);
}

/// Says where answers differ: their `Debug` form hides their bytes.
fn equal<S: Store>(probe: &Probe<'_, S>, operation: &str, seen: Option<&Outcome>, wanted: &Outcome) {
    if let (Some(Outcome::Kept(seen)), Outcome::Kept(wanted)) = (seen, wanted) {
        let part = |name: &str, of: fn(&Answer) -> &Bytes| {
            let (seen, wanted) = (of(seen), of(wanted));
            let differs = seen.iter().zip(wanted).position(|(seen, wanted)| seen != wanted);
            let at = differs.or((seen.len() != wanted.len()).then(|| seen.len().min(wanted.len())));
            if let Some(at) = at {
                let lengths = format!("{} bytes instead of {}", seen.len(), wanted.len());
                let what = format!("the {name} that `{operation}` gives differs from byte {at} on ({lengths})");
                probe.case.fail(&what);
            }
        };
        part("head", |answer| &answer.head);
        part("body", |answer| &answer.body);
    }
    probe
        .case
        .same(&format!("the outcome that `{operation}` gives"), &seen, &Some(wanted));
}
