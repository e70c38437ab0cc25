//! The promises of the protocol. The numbers are those of the invariants that the comments of the
//! crate cite.

use stateright::{Model, Property};

use crate::configuration::{Configuration, LEASE, MAX_ATTEMPTS};
use crate::rules::{Operation, Owner, Record, Reply, State};
use crate::world::{FOUND, Phase, World};

pub const ONE_EXECUTION: &str = "I1: a key is not taken over while its lease lasts";
pub const SAME_RESPONSE: &str = "I2: all callers see the same response";
pub const EFFECTS: &str = "I3: at most one effect";
pub const REQUEST: &str = "I4: a response is given only to its own request";
pub const STORED: &str = "I5: a response that was seen is stored";
pub const EVIDENCE: &str = "I6: an effect has a record";
pub const STUCK: &str = "I7: every process ends";
pub const WAIT: &str = "I7: a wait is for another owner, and at most one lease";
pub const CLAIMANT: &str = "I7: no claim is granted to a process that has left";
pub const OWNER: &str = "I8: only the owner changes a claim";
pub const FENCES: &str = "I9: the fence grows";
pub const ATTEMPTS: &str = "I10: attempts are capped";
/// Not a promise. Without it, an exploration in which nothing happens would pass.
pub const USEFUL: &str = "every process ends after one effect, and a response was seen";

/// The properties that a single step can break.
const OF_STEPS: [&str; 6] = [ONE_EXECUTION, WAIT, CLAIMANT, OWNER, FENCES, ATTEMPTS];

pub(crate) fn all() -> Vec<Property<Configuration>> {
    let mut all = vec![
        Property::always(SAME_RESPONSE, |_, world: &World| {
            world.seen.windows(2).all(|pair| pair[0].0 != pair[1].0)
        }),
        Property::always(EFFECTS, |configuration: &Configuration, world: &World| {
            world.third_party.effects <= 1 || !configuration.promises_one_effect()
        }),
        Property::always(REQUEST, |configuration: &Configuration, world: &World| {
            let is_own = |fingerprint, response| configuration.fingerprints[usize::from(response)] == fingerprint;
            world
                .seen
                .iter()
                .all(|(fingerprint, response)| *response == FOUND || is_own(*fingerprint, *response))
        }),
        Property::always(STORED, |_, world: &World| {
            let is_stored = |response| {
                world
                    .record
                    .is_some_and(|record| record.state == State::Stored(response))
            };
            world.seen.iter().all(|(_, response)| is_stored(*response))
        }),
        Property::always(EVIDENCE, |_, world: &World| {
            world.third_party.effects == 0 || world.record.is_some()
        }),
        Property::always(STUCK, |configuration: &Configuration, world: &World| {
            let mut actions = Vec::new();
            let is_over = world.processes.iter().all(|process| process.phase.is_over());
            world.broken.is_some() || is_over || {
                configuration.actions(world, &mut actions);
                !actions.is_empty()
            }
        }),
        Property::sometimes(USEFUL, |_, world: &World| {
            let is_over = world.processes.iter().all(|process| process.phase == Phase::Ended);
            is_over && world.third_party.effects == 1 && !world.seen.is_empty()
        }),
    ];
    all.extend([
        Property::always(OF_STEPS[0], |_, world: &World| world.broken != Some(OF_STEPS[0])),
        Property::always(OF_STEPS[1], |_, world: &World| world.broken != Some(OF_STEPS[1])),
        Property::always(OF_STEPS[2], |_, world: &World| world.broken != Some(OF_STEPS[2])),
        Property::always(OF_STEPS[3], |_, world: &World| world.broken != Some(OF_STEPS[3])),
        Property::always(OF_STEPS[4], |_, world: &World| world.broken != Some(OF_STEPS[4])),
        Property::always(OF_STEPS[5], |_, world: &World| world.broken != Some(OF_STEPS[5])),
    ]);
    all
}

/// Returns the property that an operation of `from` has broken. `before` is the world before the
/// operation, and `after` the record after it.
pub(crate) fn broken_by(
    before: &World,
    from: Option<Phase>,
    operation: Operation,
    reply: Reply,
    after: Option<Record>,
) -> Option<&'static str> {
    let is_changed = before.record != after;
    let owner = before.record.map(|record| record.owner);
    match (operation, reply) {
        (Operation::Claim(_), Reply::Execute(grant) | Reply::Recover(grant)) => {
            let is_repeated = owner == Some(grant.owner);
            let is_left = match from {
                Some(Phase::Claiming | Phase::Crashed) | None => false,
                Some(Phase::Ended) => true,
                Some(_) => !is_repeated,
            };
            let faults = [
                (before.is_leased() && !is_repeated, ONE_EXECUTION),
                (is_left, CLAIMANT),
                (grant.owner.fence <= before.last_fence && !is_repeated, FENCES),
                (grant.attempt > MAX_ATTEMPTS, ATTEMPTS),
            ];
            faults
                .into_iter()
                .find_map(|(is_broken, name)| is_broken.then_some(name))
        }
        (Operation::Claim(claim), Reply::Wait(left)) => {
            let is_own = owner.is_some_and(|owner| owner.nonce == claim.nonce);
            (is_own || left > LEASE).then_some(WAIT)
        }
        (Operation::Renew(by, _) | Operation::Complete(by, ..) | Operation::Release(by), _) => {
            let is_other = |owner: Owner| owner != by;
            (is_changed && owner.is_some_and(is_other)).then_some(OWNER)
        }
        (Operation::Resolve(..), _) => (is_changed && before.is_leased()).then_some(OWNER),
        _ => None,
    }
}
