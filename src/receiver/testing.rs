//! A test kit for handlers of messages. It redelivers each message in every way that brokers do,
//! and reports differences. With the feature `webhooks`, `WebhookSigner` signs webhooks as the
//! providers do.

#[cfg(feature = "webhooks")]
mod webhooks;

use std::fmt::{self, Debug};
use std::panic::resume_unwind;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use futures::future::join;

use super::receipt::Disposition;
use crate::clock::sleep;

#[cfg(feature = "webhooks")]
pub use self::webhooks::WebhookSigner;

/// A way in which the kit delivers a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scenario {
    /// The process dies while the delivery waits for the `polls`-th time, counted from 1, in the
    /// handler or in the store. For example, it dies between effect and acknowledgement. The message
    /// is then redelivered.
    Crash {
        /// The number of polls before the process dies.
        polls: usize,
    },
    /// The message is delivered and acknowledged, and then delivered once more.
    Twice,
    /// The message is delivered twice at the same time.
    TwiceAtOnce,
}

/// A difference from a message that is delivered once.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference<O> {
    /// The way in which the message was delivered.
    pub scenario: Scenario,
    /// The effects that `observe` returned at the end.
    pub observed: O,
    /// The disposition of the last delivery.
    pub disposition: Disposition,
}

/// The results of all scenarios.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report<O> {
    /// The effects of a message that was delivered once.
    pub once: O,
    /// The scenarios that gave other effects.
    pub differences: Vec<Difference<O>>,
    /// The scenarios whose messages were not acknowledged at the end. A crash left the outcome
    /// unknown, the handler rejected the message, or the message was redelivered without end.
    pub rejected: Vec<Scenario>,
    /// The number of scenarios: two, one crash for each time that the delivery waits, and one crash
    /// that comes too late, because the delivery has ended.
    pub scenarios: usize,
}

impl<O: Debug> Report<O> {
    /// Checks that every scenario had the same effects as a message that is delivered once.
    ///
    /// # Panics
    ///
    /// If there is a difference. The message lists all differences.
    #[track_caller]
    #[expect(clippy::panic, reason = "it is for tests")]
    pub fn assert_same(&self) {
        if !self.differences.is_empty() {
            panic!(
                "a message that is delivered once has the effects {:?}, but other deliveries differ: {:#?}",
                self.once, self.differences
            );
        }
    }
}

/// The number of deliveries after which the kit gives up.
const MOST_DELIVERIES: usize = 10_000;

/// Redelivers messages in every way that brokers do, and compares their effects with those of a
/// message that is delivered once.
///
/// `message` makes message number `n`, each with an id of its own. `deliver` passes one to the
/// handler under test, bare or behind a [`ReceiverLayer`](super::ReceiverLayer), and returns its
/// disposition. `observe` returns the effects of message number `n`. The kit passes on a panic of
/// any of them.
///
/// The kit delivers a message again every 10 ms while its disposition is
/// [`Redeliver`](Disposition::Redeliver), at most 10,000 times. A crash ends the runtime that
/// handles the message. Crashes need a store whose leases expire soon (a memory store, or a short
/// lease), and a handler without threads of its own.
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use std::sync::Arc;
/// use tower::{service_fn, Layer, ServiceExt};
/// use tower_idempotency::receiver::testing::redeliver;
/// use tower_idempotency::receiver::{Disposition, ReceiverLayer};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main]
/// # async fn main() {
/// let effects = Arc::new([const { AtomicUsize::new(0) }; 100]);
/// let counted = Arc::clone(&effects);
/// let handler = service_fn(move |n: usize| {
///     let effects = Arc::clone(&counted);
///     async move {
///         effects[n].fetch_add(1, Ordering::SeqCst);
///         tokio::task::yield_now().await;
///         Ok::<_, std::io::Error>(())
///     }
/// });
/// let receiver = ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|n: &usize| *n as u64).layer(handler);
/// let deliver = move |n| {
///     let receiver = receiver.clone();
///     async move { Disposition::of(&receiver.oneshot(n).await) }
/// };
/// let report = redeliver(|n| n, deliver, |n| std::future::ready(effects[n].load(Ordering::SeqCst))).await;
/// report.assert_same();
/// # }
/// ```
pub async fn redeliver<M, D, DFut, W, WFut, O>(
    message: impl Fn(usize) -> M + Send + Sync,
    deliver: D,
    observe: W,
) -> Report<O>
where
    M: Send + 'static,
    D: Fn(M) -> DFut + Clone + Send + Sync + 'static,
    DFut: Future<Output = Disposition> + Send,
    W: Fn(usize) -> WFut + Send + Sync,
    WFut: Future<Output = O> + Send,
    O: PartialEq + Send,
{
    settle(&message, &deliver, 0).await;
    let mut report = Report {
        once: observe(0).await,
        differences: Vec::new(),
        rejected: Vec::new(),
        scenarios: 0,
    };
    let mut scenarios = vec![Scenario::Twice, Scenario::TwiceAtOnce, Scenario::Crash { polls: 1 }];
    while let Some(scenario) = scenarios.pop() {
        report.scenarios += 1;
        let number = report.scenarios;
        let is_rejected = match scenario {
            Scenario::Crash { polls } => {
                if crash(deliver.clone(), message(number), polls).await {
                    scenarios.push(Scenario::Crash { polls: polls + 1 });
                }
                false
            }
            Scenario::Twice => settle(&message, &deliver, number).await == Disposition::Reject,
            Scenario::TwiceAtOnce => {
                let (one, other) = join(deliver(message(number)), deliver(message(number))).await;
                [one, other].contains(&Disposition::Reject)
            }
        };
        let disposition = settle(&message, &deliver, number).await;
        let observed = observe(number).await;
        if disposition != Disposition::Acknowledge || is_rejected {
            report.rejected.push(scenario);
        }
        if observed != report.once {
            report.differences.push(Difference {
                scenario,
                observed,
                disposition,
            });
        }
    }
    report
}

/// Delivers a message until its disposition is no longer [`Redeliver`](Disposition::Redeliver).
async fn settle<M, D, DFut>(message: &(impl Fn(usize) -> M + Sync), deliver: &D, number: usize) -> Disposition
where
    M: Send,
    D: Fn(M) -> DFut + Sync,
    DFut: Future<Output = Disposition> + Send,
{
    let mut last = Disposition::Redeliver(None);
    for _ in 0..MOST_DELIVERIES {
        last = deliver(message(number)).await;
        match last {
            Disposition::Redeliver(_) => sleep(Duration::from_millis(10)).await,
            Disposition::Acknowledge | Disposition::Reject => break,
        }
    }
    last
}

/// Handles a message in a runtime of its own, which ends after `polls` polls. Returns false if the
/// handler completed before. Passes a panic of the handler on, because treating it as an end would
/// skip the later crashes.
#[expect(clippy::panic, reason = "it is for tests")]
async fn crash<M, D, DFut>(deliver: D, message: M, polls: usize) -> bool
where
    M: Send + 'static,
    D: Fn(M) -> DFut + Send + 'static,
    DFut: Future<Output = Disposition> + Send,
{
    let dying = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let has_died = runtime.block_on(async {
            let mut handling = pin!(deliver(message));
            let mut polled = 0;
            std::future::poll_fn(|cx| {
                if handling.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(false);
                }
                polled += 1;
                if polled < polls {
                    Poll::Pending
                } else {
                    Poll::Ready(true)
                }
            })
            .await
        });
        runtime.shutdown_background();
        Ok::<_, std::io::Error>(has_died)
    };
    match tokio::task::spawn_blocking(dying).await {
        Ok(Ok(has_died)) => has_died,
        Ok(Err(error)) => panic!("cannot start a runtime for the crash: {error}"),
        Err(error) => resume_unwind(error.into_panic()),
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crash { polls } => write!(f, "a crash after {polls} polls"),
            Self::Twice => f.write_str("delivered twice"),
            Self::TwiceAtOnce => f.write_str("delivered twice at once"),
        }
    }
}
