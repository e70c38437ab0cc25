//! The plan of a program: the transactions of each run of a handler, and the requests.

use std::fmt;
use std::time::Duration;

use tower_idempotency::{IdempotencyLayer, OnError, OnLost, PostgresStore};

use crate::random::Random;

const STATUSES: [u16; 8] = [200, 201, 202, 303, 404, 409, 500, 503];

pub(super) struct Plan {
    pub(super) seed: u64,
    on_error: OnError,
    on_lost: OnLost,
    pub(super) is_for_webhooks: bool,
    /// The runs of the handler, one after the other and then again from the first one.
    runs: Vec<Run>,
    /// The process of each request. The requests of a group are sent at once.
    pub(super) groups: Vec<Vec<usize>>,
}

/// One run of the handler.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) steps: Vec<Step>,
    pub(super) takeover: Option<Takeover>,
    pub(super) end: End,
}

/// Another attempt, which takes the key over while a transaction is open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Takeover {
    pub(super) step: usize,
    /// Whether the other attempt completes the key, and does not release it.
    pub(super) completes: bool,
}

/// One transaction.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) completion: Option<Completion>,
    pub(super) ending: Ending,
}

#[derive(Debug)]
pub(super) struct Completion {
    pub(super) shape: Shape,
    /// The number of polls after which the handler drops the completion.
    pub(super) polls: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    Commit,
    /// A task commits after this time.
    CommitLater(Duration),
    Drop,
    Rollback,
}

/// The end of a run.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    Fail,
    /// Returns the response of this step.
    Made(usize),
    Other(Shape),
    Panic,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) status: u16,
    pub(super) form: Form,
    pub(super) length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    DoNotStore,
    OutcomeOnly,
    Plain,
    Stream,
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed, 3);
        let mut groups = Vec::new();
        for request in 0..=random.pick(&[1, 2, 3]) {
            if request == 0 || random.chance(60) {
                groups.push(Vec::new());
            }
            groups.last_mut().unwrap().push(random.below(2));
        }
        Self {
            seed,
            on_error: random.pick(&[OnError::Release, OnError::Store, OnError::Unknown]),
            on_lost: random.pick(&[OnLost::Execute, OnLost::Refuse]),
            is_for_webhooks: random.chance(30),
            runs: (0..=random.below(3)).map(|_| run(random)).collect(),
            groups,
        }
    }

    pub(super) fn run(&self, number: usize) -> &Run {
        &self.runs[number % self.runs.len()]
    }

    pub(super) fn layer(&self, store: PostgresStore) -> IdempotencyLayer<PostgresStore> {
        let layer = IdempotencyLayer::new(store);
        let layer = if self.is_for_webhooks { layer.webhooks() } else { layer };
        layer.on_error(self.on_error).on_lost(self.on_lost)
    }

    /// Whether a failure leaves it unknown whether the request took effect.
    pub(super) fn gives_up(&self) -> bool {
        self.on_error == OnError::Unknown
    }

    pub(super) fn stores_failures(&self) -> bool {
        self.on_error == OnError::Store
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_for_webhooks { "webhooks, " } else { "" };
        writeln!(f, "  {kind}{:?}, {:?}", self.on_error, self.on_lost)?;
        writeln!(f, "  processes of the requests: {:?}", self.groups)?;
        self.runs.iter().try_for_each(|run| writeln!(f, "  {run:?}"))
    }
}

fn run(random: &mut Random) -> Run {
    let commits = random.chance(60);
    let steps: Vec<Step> = (0..=random.below(4)).map(|_| step(random, commits)).collect();
    let made = (0..steps.len()).filter(|step| steps[*step].completion.is_some());
    let made: Vec<usize> = made.collect();
    let end = match random.below(10) {
        0 => End::Fail,
        1 => End::Panic,
        2..=5 if !made.is_empty() => End::Made(random.pick(&made)),
        6..=8 if !made.is_empty() => End::Made(made[made.len() - 1]),
        _ => End::Other(shape(random)),
    };
    let takeover = Takeover {
        step: random.below(steps.len()),
        completes: random.chance(60),
    };
    Run {
        steps,
        takeover: random.chance(15).then_some(takeover),
        end,
    }
}

fn step(random: &mut Random, may_commit: bool) -> Step {
    let completion = Completion {
        shape: shape(random),
        polls: random.chance(15).then(|| random.pick(&[1, 2, 3, 4])),
    };
    let later = Ending::CommitLater(random.millis(0..60));
    let endings = [Ending::Drop, Ending::Rollback, Ending::Commit, later];
    Step {
        completion: random.chance(80).then_some(completion),
        ending: random.pick(&endings[..if may_commit { 4 } else { 2 }]),
    }
}

fn shape(random: &mut Random) -> Shape {
    let form = match random.below(20) {
        0 => Form::DoNotStore,
        1 => Form::Stream,
        2..=4 => Form::OutcomeOnly,
        _ => Form::Plain,
    };
    Shape {
        status: random.pick(&STATUSES),
        form,
        length: random.pick(&[0, 10, 5_000]),
    }
}
