//! Random handlers of messages over PostgreSQL, from a seed. Each run of a handler makes several
//! transactions, which complete the message or not, and commit or not. A model computes the
//! receipt of each delivery, and whether the next one runs.
//!
//! `HISTORIES=1000` sets the number of seeds, and `HISTORIES=17..18` their range.

use std::collections::HashSet;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use sqlx::{PgPool, Postgres, Transaction};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Claim, Decision, IfLost, Nonce, Outcome, Owner, Renewal, Status};
use tower_idempotency::receiver::{HandlerErrorClass, MessageLease, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{ErrorKind, OnError, PostgresStore, Store};

use crate::postgres::Bench;
use crate::random::Random;
use crate::support::drop_after;
use crate::support::settings::{is_thorough, seeds};

const HOUR: Duration = Duration::from_secs(3_600);

/// The time for one program. A program takes less than a second.
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Ending {
    Commit,
    /// A task commits after this time.
    CommitLater(Duration),
    Drop,
    Rollback,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    /// Whether the handler completes the message in this transaction.
    completes: bool,
    /// The handler drops the completion after so many polls.
    polls: Option<usize>,
    ending: Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fail,
    Panic,
    Reject,
    Succeed,
}

/// Another attempt takes the message over in a step, and completes or releases it.
#[derive(Clone, Copy, Debug)]
struct Takeover {
    step: usize,
    completes: bool,
}

#[derive(Debug)]
struct Run {
    steps: Vec<Step>,
    end: End,
    takeover: Option<Takeover>,
}

#[derive(Debug)]
struct Plan {
    seed: u64,
    on_error: OnError,
    at_least_once: bool,
    /// One for each delivery. If the handler does not run for a delivery, the test skips its run.
    runs: Vec<Run>,
}

impl Plan {
    fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed, 5);
        Self {
            seed,
            on_error: random.pick(&[OnError::Release, OnError::Store, OnError::Unknown, OnError::Reject]),
            at_least_once: random.chance(70),
            runs: (0..3).map(|_| Run::of(random)).collect(),
        }
    }
}

impl Run {
    fn of(random: &mut Random) -> Self {
        let steps: Vec<Step> = (0..random.below(4)).map(|_| Step::of(random)).collect();
        let takeover = Takeover {
            step: random.below(steps.len().max(1)),
            completes: random.chance(50),
        };
        Self {
            end: random.pick(&[End::Fail, End::Panic, End::Reject, End::Succeed, End::Succeed]),
            takeover: (!steps.is_empty() && random.chance(20)).then_some(takeover),
            steps,
        }
    }
}

impl Step {
    fn of(random: &mut Random) -> Self {
        let later = Ending::CommitLater(random.millis(0..50));
        Self {
            completes: random.chance(75),
            polls: random.chance(40).then(|| 1 + random.below(3)),
            ending: random.pick(&[Ending::Commit, later, Ending::Drop, Ending::Rollback]),
        }
    }
}

/// The result of a completion for its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Completed,
    /// The handler dropped the future, so the completion may have taken effect.
    Dropped,
    Failed(ErrorKind),
    Nothing,
}

/// One run, as its handler saw it.
#[derive(Debug, Default)]
struct Ran {
    /// The result of each step, and whether its transaction is to be committed.
    steps: Vec<(Tried, bool)>,
    /// `Some` if another attempt took the message over. The value shows whether it completed the
    /// message.
    taken_over: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Got {
    Duplicate,
    Failed,
    First,
    InFlight,
    Panicked,
    Rejected,
    Store,
    Unknown,
    Unrecorded,
}

fn got(received: Result<Receipt<()>, ReceiveError<&str>>) -> Got {
    match received {
        Ok(Receipt::First(())) => Got::First,
        Ok(Receipt::Duplicate) => Got::Duplicate,
        Ok(Receipt::InFlight { .. }) => Got::InFlight,
        Ok(Receipt::Unknown) => Got::Unknown,
        Err(ReceiveError::Handler(_)) => Got::Failed,
        Err(ReceiveError::Panicked) => Got::Panicked,
        Err(ReceiveError::Rejected(_)) => Got::Rejected,
        Err(ReceiveError::Store(_)) => Got::Store,
        Err(ReceiveError::Unrecorded(_)) => Got::Unrecorded,
        Err(other) => panic!("{other:?}"),
    }
}

/// The state of the message before a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The next delivery runs.
    Free,
    Handled,
    /// The next delivery runs under `at_least_once`, and is unknown otherwise.
    Lost,
    Rejected,
}

#[derive(Clone)]
struct Message {
    id: String,
    lease: Option<MessageLease>,
}

struct Program {
    plan: Plan,
    store: PostgresStore,
    pool: PgPool,
    ran: Mutex<Vec<Ran>>,
    later: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Program {
    fn id(&self) -> String {
        format!("program-{}", self.plan.seed)
    }

    fn layer(&self) -> ReceiverLayer<PostgresStore, Message> {
        let layer = ReceiverLayer::new(self.store.clone(), "billing")
            .with_id(|message: &Message| message.id.clone())
            .pass_lease(|message: &mut Message, lease| message.lease = Some(lease))
            .on_error(self.plan.on_error)
            .with_lease(HOUR)
            .with_error_class(|error: &&str| match *error {
                "reject" => HandlerErrorClass::Reject,
                _ => HandlerErrorClass::Redeliver,
            });
        match self.plan.at_least_once {
            true => layer.at_least_once(),
            false => layer,
        }
    }

    async fn handle(&self, delivery: usize, lease: MessageLease) -> Result<(), &'static str> {
        let run = &self.plan.runs[delivery];
        self.ran.lock().unwrap().push(Ran::default());
        for (number, step) in run.steps.iter().enumerate() {
            let mut transaction = self.pool.begin().await.unwrap();
            let insert = sqlx::query("INSERT INTO effects (message) VALUES ($1)");
            let insert = insert.bind(format!("{} {delivery}.{number}", self.plan.seed));
            insert.execute(&mut *transaction).await.unwrap();
            if let Some(takeover) = run.takeover.filter(|takeover| takeover.step == number) {
                self.take_over(takeover).await;
            }
            let tried = try_to_complete(*step, &lease, &mut transaction).await;
            let commits = matches!(step.ending, Ending::Commit | Ending::CommitLater(_));
            // After an error, the handler must roll back.
            let commits = commits && !matches!(tried, Tried::Failed(_));
            self.ran
                .lock()
                .unwrap()
                .last_mut()
                .unwrap()
                .steps
                .push((tried, commits));
            let ending = match step.ending {
                // After a dropped completion, the transaction must end before the handler does.
                Ending::CommitLater(_) if tried == Tried::Dropped => Ending::Commit,
                ending => ending,
            };
            self.end(transaction, ending, commits).await;
        }
        match run.end {
            End::Fail => Err("fail"),
            // Unlike `panic!`, this prints nothing.
            End::Panic => resume_unwind(Box::new("the handler panics")),
            End::Reject => Err("reject"),
            End::Succeed => Ok(()),
        }
    }

    /// Ends the lease, and claims the message for another attempt, unless the message is handled.
    async fn take_over(&self, takeover: Takeover) {
        let key = self.layer().storage_key(self.id()).unwrap();
        let record = self.store.peek(&key).await.unwrap().unwrap();
        let owner = Owner {
            nonce: record.nonce,
            fence: record.fence,
        };
        let ended = self.store.renew(&key, owner, Duration::ZERO).await.unwrap();
        if ended == Renewal::Superseded {
            return;
        }
        let claim = Claim {
            key,
            fingerprint: record.fingerprint,
            nonce: Nonce::random(),
            lease: HOUR,
            retention: HOUR,
            if_lost: IfLost::Execute,
            max_attempts: 99,
        };
        let Decision::Execute(grant) = self.store.claim(&claim).await.unwrap() else {
            return;
        };
        self.ran.lock().unwrap().last_mut().unwrap().taken_over = Some(takeover.completes);
        if takeover.completes {
            let done = self.store.complete(&key, grant.owner, &Outcome::Tombstone, HOUR);
            done.await.unwrap();
        } else {
            self.store.release(&key, grant.owner).await.unwrap();
        }
    }

    async fn end(&self, transaction: Transaction<'static, Postgres>, ending: Ending, commits: bool) {
        match ending {
            Ending::Commit if commits => transaction.commit().await.unwrap(),
            Ending::CommitLater(delay) if commits => {
                let later = tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    transaction.commit().await.unwrap();
                });
                self.later.lock().unwrap().push(later);
            }
            Ending::Drop => drop(transaction),
            Ending::Rollback | Ending::Commit | Ending::CommitLater(_) => transaction.rollback().await.unwrap(),
        }
    }

    /// Delivers the message several times, and checks each receipt.
    async fn play(self: Arc<Self>) -> Result<(), String> {
        let key = self.layer().storage_key(self.id()).unwrap();
        let mut state = State::Free;
        for delivery in 0..self.plan.runs.len() {
            let runs_before = self.ran.lock().unwrap().len();
            let got = self.deliver(delivery).await;
            let later = std::mem::take(&mut *self.later.lock().unwrap());
            for task in later {
                task.await.unwrap();
            }
            let rows = self.rows(delivery).await;
            let record = self.store.peek(&key).await.unwrap().map(|record| record.status);
            let ran = self.ran.lock().unwrap();
            let runs = state == State::Free || (state == State::Lost && self.plan.at_least_once);
            ensure(ran.len() == runs_before + usize::from(runs), || {
                format!("delivery {delivery} must run: {runs}, because the message was {state:?}")
            })?;
            if !runs {
                let expected = if state == State::Handled {
                    Got::Duplicate
                } else {
                    Got::Unknown
                };
                ensure(got == expected, || {
                    format!("delivery {delivery} of a message that was {state:?} got {got:?}")
                })?;
                continue;
            }
            let (expected, after) = self.expected(delivery, ran.last().unwrap(), &rows, record.as_ref())?;
            ensure(expected.contains(&got), || {
                format!("delivery {delivery} got {got:?}, and must get one of {expected:?}")
            })?;
            let is_handled = matches!(record, Some(Status::Completed(Outcome::Tombstone | Outcome::Stored(_))));
            let is_lost = record == Some(Status::Lost);
            let is_right = match after {
                State::Free => record.is_none() || (is_lost && self.plan.at_least_once),
                State::Handled => is_handled,
                State::Lost => is_lost,
                State::Rejected => record == Some(Status::Unknown),
            };
            ensure(is_right, || {
                format!("after delivery {delivery}, the message is {record:?}, and must be {after:?}")
            })?;
            state = after;
        }
        Ok(())
    }

    async fn deliver(self: &Arc<Self>, delivery: usize) -> Got {
        let program = Arc::clone(self);
        let receiver = self.layer().layer(service_fn(move |message: Message| {
            let program = Arc::clone(&program);
            async move { program.handle(delivery, message.lease.unwrap()).await }
        }));
        let message = Message {
            id: self.id(),
            lease: None,
        };
        got(receiver.oneshot(message).await)
    }

    /// Returns the numbers of the steps whose row is committed.
    async fn rows(&self, delivery: usize) -> HashSet<usize> {
        let prefix = format!("{} {delivery}.", self.plan.seed);
        let rows = sqlx::query_scalar::<_, String>("SELECT message FROM effects WHERE message LIKE $1");
        let rows = rows.bind(format!("{prefix}%")).fetch_all(&self.pool).await.unwrap();
        rows.iter().map(|row| row[prefix.len()..].parse().unwrap()).collect()
    }

    /// Returns the receipts that the delivery of a run may get, and the state after it.
    fn expected(
        &self,
        delivery: usize,
        ran: &Ran,
        rows: &HashSet<usize>,
        record: Option<&Status>,
    ) -> Result<(Vec<Got>, State), String> {
        let is_handled = matches!(record, Some(Status::Completed(Outcome::Tombstone)));
        let mut recorded = 0;
        for (number, (tried, commits)) in ran.steps.iter().enumerate() {
            let has_row = rows.contains(&number);
            ensure(has_row == *commits || *tried == Tried::Dropped, || {
                format!("the row of {delivery}.{number}: {has_row}, although its commit: {commits}")
            })?;
            // A dropped completion may have taken effect.
            let counts = *tried == Tried::Completed || (*tried == Tried::Dropped && is_handled);
            recorded += usize::from(has_row && counts);
        }
        let completed = ran.steps.iter().enumerate();
        let completed = completed.filter(|(number, (tried, _))| *tried == Tried::Completed && rows.contains(number));
        ensure(completed.count() <= 1, || {
            "several transactions completed the message".to_owned()
        })?;
        let end = self.plan.runs[delivery].end;
        let failed = match end {
            End::Panic => Got::Panicked,
            _ => Got::Failed,
        };
        if ran.taken_over.is_none() && recorded > 0 {
            // The message is handled, even if the handler then failed. Its end decides only which
            // receipt the delivery gets.
            let expected = match (end, self.plan.on_error) {
                (End::Succeed, _) => Got::First,
                (End::Fail | End::Panic, OnError::Store) => failed,
                _ => Got::Duplicate,
            };
            return Ok((vec![expected], State::Handled));
        }
        match ran.taken_over {
            Some(true) => return Ok((vec![Got::Duplicate], State::Handled)),
            Some(false) => {
                let mut without_outcome = vec![Got::InFlight, Got::Unknown, Got::Unrecorded];
                if matches!(end, End::Fail | End::Panic) {
                    without_outcome.push(failed);
                }
                return Ok((without_outcome, State::Lost));
            }
            None => {}
        }
        let has_begun = ran.steps.iter().any(|(tried, _)| *tried != Tried::Nothing);
        Ok(match (end, self.plan.on_error) {
            (End::Succeed, _) if has_begun => (vec![Got::Unrecorded], State::Free),
            (End::Succeed, _) => (vec![Got::First], State::Handled),
            (End::Reject, _) | (End::Panic, OnError::Reject) => (vec![Got::Rejected], State::Rejected),
            (_, OnError::Release | OnError::Reject) => (vec![failed], State::Free),
            (_, OnError::Store) => (vec![failed], State::Handled),
            _ => (vec![failed], State::Lost),
        })
    }
}

async fn try_to_complete(step: Step, lease: &MessageLease, transaction: &mut Transaction<'static, Postgres>) -> Tried {
    if !step.completes {
        return Tried::Nothing;
    }
    let completing = lease.complete_in(transaction);
    let completed = match step.polls {
        Some(polls) => drop_after(polls, completing).await,
        None => Some(completing.await),
    };
    match completed {
        Some(Ok(())) => Tried::Completed,
        Some(Err(error)) => Tried::Failed(error.kind()),
        None => Tried::Dropped,
    }
}

fn ensure(holds: bool, violation: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(violation()) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_program_of_transactions_follows_the_model() {
    let bench = Bench::new().await;
    let seeds = seeds("HISTORIES").unwrap_or(0..if is_thorough() { 2_000 } else { 300 });
    let programs = seeds.map(|seed| {
        let program = Arc::new(Program {
            plan: Plan::of(seed),
            store: bench.store.clone(),
            pool: bench.pool.clone(),
            ran: Mutex::default(),
            later: Mutex::default(),
        });
        let playing = tokio::spawn(tokio::time::timeout(LONG, Arc::clone(&program).play()));
        async move {
            let played = playing.await.unwrap();
            let violation = played.unwrap_or_else(|_| Err("the program hangs".to_owned())).err()?;
            Some(format!(
                "{violation}\n{:#?}\n{:?}\nRepeat this program with HISTORIES={seed}..{} cargo test --all-features --test \
                 receiver -- programs",
                program.plan,
                program.ran.lock().unwrap(),
                seed + 1,
            ))
        }
    });
    let violations = futures::stream::iter(programs)
        .buffered(16)
        .filter_map(std::future::ready);
    let violations: Vec<String> = violations.collect().await;
    assert!(
        violations.is_empty(),
        "{} programs fail\n{}",
        violations.len(),
        violations.join("\n\n")
    );
}
