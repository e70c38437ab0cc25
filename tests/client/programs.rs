//! Random jobs of steps, from a seed. Two deployments run a job under one key, and the process
//! crashes at any await. A model decides from the records which step runs, which one is replayed,
//! and which one fails.
//!
//! `HISTORIES=1000` sets the number of seeds, and `HISTORIES=17..18` their range.

mod model;
mod plan;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tower_idempotency::client::{Attempt, Failure, Once, OnceError, Steps, once};
use tower_idempotency::{Clock, Timestamp};

use crate::histories::{paused, seeds};
use crate::support::{RemoteStore, yield_times};
use plan::{Act, Node, Plan, Work};

/// The result of a step for its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Got {
    Done {
        value: u64,
        is_replay: bool,
    },
    Failed,
    StepChanged {
        position: usize,
    },
    Unknown,
    Unreadable,
    /// An error that no history should cause.
    Unexpected,
}

/// The positions of a step and of the steps around it, outermost first.
type Place = Vec<usize>;

#[derive(Clone, Debug)]
enum Entry {
    Run(usize),
    Began { id: String },
    Effect(Act),
    Got(Place, Got),
}

/// A third party that numbers its effects.
#[derive(Clone, Default)]
struct Party(Arc<Mutex<Vec<Entry>>>);

impl Party {
    fn push(&self, entry: Entry) {
        self.0.lock().unwrap().push(entry);
    }

    fn entries(&self) -> Vec<Entry> {
        self.0.lock().unwrap().clone()
    }

    /// Makes the call of a step. Its value is the number of its entry.
    async fn act(&self, act: Act, attempt: Attempt) -> Result<u64, Failure<String>> {
        self.push(Entry::Began { id: attempt.id("call") });
        yield_times(1).await;
        self.push(Entry::Effect(act));
        let value = u64::try_from(self.entries().len()).unwrap();
        yield_times(1).await;
        match act {
            Act::Succeed => Ok(value),
            Act::NotDone => Err(Failure::NotDone("refused".to_owned())),
            Act::Lose => Err(Failure::Unknown("reset".to_owned())),
        }
    }

    async fn typed<T>(&self, step: Once<RemoteStore>, act: Act) -> Result<(T, bool), Got>
    where
        T: From<Value> + Serialize + DeserializeOwned + Send + 'static,
    {
        let party = self.clone();
        let done = step.run(move |attempt| async move {
            let done = party.act(act, attempt).await;
            done.map(|value| T::from(Value(value)))
        });
        match done.await {
            Ok(done) => {
                let is_replay = done.is_replay();
                Ok((done.into_value(), is_replay))
            }
            Err(OnceError::Failed(_)) => Err(Got::Failed),
            Err(OnceError::StepChanged { position }) => Err(Got::StepChanged { position }),
            Err(OnceError::Unknown(_)) => Err(Got::Unknown),
            Err(OnceError::Unreadable(_)) => Err(Got::Unreadable),
            // The store works, and no two runs overlap.
            Err(_) => Err(Got::Unexpected),
        }
    }

    async fn step(&self, step: Once<RemoteStore>, act: Act, is_text: bool) -> Got {
        let done = if is_text {
            let done = self.typed::<String>(step, act).await;
            done.map(|(text, is_replay)| (text.parse().unwrap(), is_replay))
        } else {
            let done = self.typed::<Number>(step, act).await;
            done.map(|(number, is_replay)| (number.0, is_replay))
        };
        match done {
            Ok((value, is_replay)) => Got::Done { value, is_replay },
            Err(got) => got,
        }
    }

    /// Runs the steps of a job, or of a step that has steps of its own. Returns whether the job
    /// goes on.
    fn run<'a>(
        &'a self,
        steps: &'a mut Steps<RemoteStore>,
        nodes: &'a [Node],
        around: &'a [usize],
        acts: &'a mut (dyn Iterator<Item = Act> + Send),
    ) -> BoxFuture<'a, bool> {
        async move {
            for (position, node) in nodes.iter().enumerate() {
                let place = [around, &[position]].concat();
                let mut step = steps.step(node.name);
                if let Some(input) = node.input {
                    step = step.with_input([input]);
                }
                if node.at_least_once() {
                    step = step.at_least_once();
                }
                match &node.work {
                    Work::Skipped => drop(step),
                    Work::Steps(nodes) => {
                        if !self.run(&mut step.steps(), nodes, &place, &mut *acts).await {
                            return false;
                        }
                    }
                    Work::Call { is_text } => {
                        let act = acts.next().unwrap();
                        let got = self.step(step, act, *is_text).await;
                        self.push(Entry::Got(place, got));
                        if !matches!(got, Got::Done { .. } | Got::Failed) {
                            return false;
                        }
                    }
                }
            }
            true
        }
        .boxed()
    }
}

struct Value(u64);

impl From<Value> for String {
    fn from(value: Value) -> Self {
        value.0.to_string()
    }
}

#[derive(Deserialize, Serialize)]
struct Number(u64);

impl From<Value> for Number {
    fn from(value: Value) -> Self {
        Self(value.0)
    }
}

/// Runs every deployment of the plan in a runtime of its own, which ends at the crash.
fn play(plan: &Plan) -> Vec<Entry> {
    let clock = Clock::manual(Timestamp::from_micros(1));
    let (store, party) = (RemoteStore::with_clock(clock.clone()), Party::default());
    for (at, run) in plan.runs.iter().enumerate() {
        party.push(Entry::Run(at));
        paused().block_on(async {
            let mut acts = run.acts.iter().copied().cycle();
            let mut steps = once(store.clone(), "order-1").with_wait(Duration::ZERO).steps();
            let mut job = pin!(party.run(&mut steps, plan.nodes(run), &[], &mut acts));
            let mut polls = 0;
            poll_fn(|cx| {
                polls += 1;
                if run.crash.is_some_and(|crash| polls > crash) {
                    return Poll::Ready(());
                }
                job.poll_unpin(cx).map(drop)
            })
            .await;
        });
        // The lease of a lost attempt ends.
        clock.advance(Duration::from_secs(31));
    }
    party.entries()
}

#[test]
fn every_history_of_steps_follows_the_model() {
    for seed in seeds(600, 30_000) {
        let plan = Plan::of(seed);
        let entries = play(&plan);
        let Err(violation) = model::check(&plan, &entries) else {
            continue;
        };
        let entries: Vec<String> = entries.iter().map(|entry| format!("  {entry:?}")).collect();
        panic!(
            "{violation}\n{plan}{}\nRepeat this history with HISTORIES={seed}..{}.",
            entries.join("\n"),
            seed + 1
        );
    }
}
