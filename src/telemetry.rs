//! Telemetry of the crate: the names of its span, events and metrics, in one place. The crate's
//! page documents them.

#[cfg(feature = "metrics")]
use std::time::Duration;

use tracing::Span;

use crate::error::{Error, ErrorKind};

pub(crate) const TARGET: &str = "tower_idempotency";

/// Unusual events. Each is counted and logged under its own name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A runtime that shut down dropped an execution before it ended. The execution's lease was
    /// given up.
    Abandoned,
    /// A claim failed and was repeated with its nonce.
    ClaimRepeated,
    /// An operation that ends a claim or an execution failed and was repeated.
    OperationRepeated,
    /// A query of a record that an owner in another process holds failed and was repeated.
    LookRepeated,
    /// The result of a transaction was found out after its caller had been refused.
    #[cfg(feature = "postgres")]
    TransactionResolvedLate,
    /// The limit of executions whose callers left is reached, so a new one was refused.
    Overloaded,
    /// The end of an execution was recorded after its caller had got a response that says it is not
    /// recorded.
    OutcomeRecordedLate,
    /// The caller hung up, and its execution continued in the background.
    Rescued,
    /// A claim with an unknown result was released after its request had been refused.
    ClaimReleasedLate,
    /// A message of an outbox could not be published. The relay tries again later.
    #[cfg(feature = "postgres")]
    MessageFailed,
    /// The row of a message of an outbox could not be read. The relay tries again later.
    #[cfg(feature = "postgres")]
    MessageUnreadable,
    /// The relay could not take the messages of an outbox, or could not record their results. It
    /// tries again later.
    #[cfg(feature = "postgres")]
    RelayFailed,
    /// The error of a message's handler is not of the type that the classifier accepts.
    ErrorUnclassified,
    /// A lease could not be renewed. The renewal is tried again while the lease lasts.
    RenewalFailed,
    /// The handler panicked, its service failed, or a response broke off that was not to be stored.
    HandlerFailed,
    /// A handler completed in a transaction that was not committed.
    #[cfg(feature = "postgres")]
    RolledBack,
    /// A response was too large, too slow, a stream or broken, and the store recorded a tombstone
    /// in its place.
    Tombstone,
    /// Two messages of different types had the same id.
    TypeMismatch,
    /// The store could not record the end of an execution.
    Unrecorded,
    /// The store failed and the request ran without protection, as configured.
    Unprotected,
    /// An owner found that its key had been taken over.
    Superseded,
    /// A server does not report its settings, so they could not be checked.
    #[cfg(feature = "redis")]
    Unchecked,
    /// A record could not be read, and the request was refused.
    RecordUnreadable,
    /// The store failed, and the request was refused.
    StoreFailed,
    /// The store is misconfigured, and the request was refused.
    StoreMisconfigured,
    /// Expired records could not be deleted. The store tries again later.
    #[cfg(feature = "postgres")]
    SweepFailed,
    /// A webhook could not be verified, and was rejected.
    #[cfg(feature = "webhooks")]
    WebhookRejected,
}

impl Event {
    const fn name(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::ClaimRepeated => "claim-repeated",
            Self::OperationRepeated => "operation-repeated",
            Self::LookRepeated => "look-repeated",
            #[cfg(feature = "postgres")]
            Self::TransactionResolvedLate => "transaction-resolved-late",
            Self::Overloaded => "overloaded",
            Self::OutcomeRecordedLate => "outcome-recorded-late",
            Self::Rescued => "rescued",
            #[cfg(feature = "postgres")]
            Self::MessageFailed => "message-failed",
            #[cfg(feature = "postgres")]
            Self::MessageUnreadable => "message-unreadable",
            #[cfg(feature = "postgres")]
            Self::RelayFailed => "relay-failed",
            Self::ClaimReleasedLate => "claim-released-late",
            Self::RenewalFailed => "renewal-failed",
            Self::ErrorUnclassified => "error-unclassified",
            Self::HandlerFailed => "handler-failed",
            Self::Tombstone => "tombstone",
            Self::TypeMismatch => "type-mismatch",
            Self::Unrecorded => "unrecorded",
            Self::Unprotected => "unprotected",
            Self::Superseded => "superseded",
            #[cfg(feature = "redis")]
            Self::Unchecked => "unchecked",
            Self::RecordUnreadable => "record-unreadable",
            Self::StoreFailed => "store-failed",
            Self::StoreMisconfigured => "store-misconfigured",
            #[cfg(feature = "postgres")]
            Self::SweepFailed => "sweep-failed",
            #[cfg(feature = "postgres")]
            Self::RolledBack => "rolled-back",
            #[cfg(feature = "webhooks")]
            Self::WebhookRejected => "webhook-rejected",
        }
    }
}

impl Event {
    const fn message(self) -> &'static str {
        match self {
            Self::Abandoned => "an execution was dropped before it ended, so its lease was given up",
            Self::ClaimRepeated => "a claim failed and is repeated",
            Self::OperationRepeated => "an operation that ends a claim or an execution failed and is repeated",
            Self::LookRepeated => "a query of a record failed and is repeated",
            #[cfg(feature = "postgres")]
            Self::TransactionResolvedLate => "the result of a transaction was found out late",
            Self::ErrorUnclassified => {
                "the handler's error is not of the type that `with_error_class` accepts, so it was not classified"
            }
            Self::HandlerFailed => "the handler panicked or its service failed",
            #[cfg(feature = "postgres")]
            Self::MessageFailed => "a message of an outbox could not be published",
            #[cfg(feature = "postgres")]
            Self::MessageUnreadable => "the row of a message of an outbox could not be read",
            #[cfg(feature = "postgres")]
            Self::RelayFailed => "the messages of an outbox could not be taken, or their results could not be recorded",
            Self::Overloaded => "too many executions are running whose callers left, so a new one was refused",
            Self::OutcomeRecordedLate => "the end of an execution was recorded late",
            Self::ClaimReleasedLate => "a claim with an unknown result was released",
            Self::RenewalFailed => "a lease could not be renewed",
            Self::Rescued => "the caller left, and its execution continues",
            Self::RecordUnreadable => "a record could not be read and the request was refused",
            Self::StoreFailed => "the store failed and the request was refused",
            Self::StoreMisconfigured => "the store is misconfigured and the request was refused",
            #[cfg(feature = "postgres")]
            Self::SweepFailed => "expired records could not be deleted",
            #[cfg(feature = "postgres")]
            Self::RolledBack => "a handler completed its key in a transaction that was not committed",
            Self::Superseded => "an owner found its key taken over",
            #[cfg(feature = "redis")]
            Self::Unchecked => {
                "the Redis server does not report its settings; make sure that it is version 7.0 or later, with maxmemory-policy noeviction"
            }
            Self::Tombstone => "a response is not stored; requests with its key will not run again",
            Self::TypeMismatch => {
                "two messages under one id differ in type; make the type a part of the id: `MessageId::of([\"cancelled\", id])`"
            }
            Self::Unprotected => "the store failed and the request runs without protection",
            Self::Unrecorded => "the end of an execution could not be recorded",
            #[cfg(feature = "webhooks")]
            Self::WebhookRejected => "a webhook could not be verified and was rejected",
        }
    }
}

pub(crate) fn event(event: Event) {
    count_event(event);
    match event {
        // Clients hang up often, so this is no warning.
        Event::Rescued => tracing::info!(target: TARGET, event = event.name(), "{}", event.message()),
        _ => tracing::warn!(target: TARGET, event = event.name(), "{}", event.message()),
    }
}

/// Logs a tombstone. The level is DEBUG if the handler or the type of the response asked for it,
/// and WARN if a response is lost.
pub(crate) fn tombstone(is_planned: bool) {
    if is_planned {
        count_event(Event::Tombstone);
        tracing::debug!(target: TARGET, event = Event::Tombstone.name(), "{}", Event::Tombstone.message());
    } else {
        event(Event::Tombstone);
    }
}

/// Logs an error. The level is ERROR if an operator has to act because no retry helps, and WARN
/// otherwise.
pub(crate) fn failure(event: Event, error: &Error) {
    count_event(event);
    let cause = std::error::Error::source(error);
    if matches!(error.kind(), ErrorKind::Configuration | ErrorKind::CorruptRecord) {
        tracing::error!(target: TARGET, event = event.name(), error = %error, kind = ?error.kind(), cause, "{}", event.message());
    } else {
        tracing::warn!(target: TARGET, event = event.name(), error = %error, kind = ?error.kind(), cause, "{}", event.message());
    }
}

/// Logs an error of the store that causes the refusal of a request or a message.
pub(crate) fn store_failed(error: &Error) {
    let event = match error.kind() {
        ErrorKind::Configuration => Event::StoreMisconfigured,
        ErrorKind::CorruptRecord => Event::RecordUnreadable,
        _ => Event::StoreFailed,
    };
    failure(event, error);
}

/// Logs a message of an outbox that is tried again later. `position` identifies its row. The id is
/// not logged, because it may be a key.
#[cfg(feature = "postgres")]
pub(crate) fn message_failed(event: Event, position: i64, failures: i32, error: &dyn std::fmt::Display) {
    count_event(event);
    tracing::warn!(target: TARGET, event = event.name(), position, failures, error = %error, "{}", event.message());
}

/// Logs the reason why a webhook is rejected. `consumer` is the name of the layer, which the
/// application has chosen.
#[cfg(feature = "webhooks")]
pub(crate) fn webhook_rejected(consumer: &str, reason: &'static str) {
    let event = Event::WebhookRejected;
    count_event(event);
    count_webhook_rejected(reason);
    tracing::warn!(target: TARGET, event = event.name(), consumer, reason, "{}", event.message());
}

/// Returns the span of a guarded request. Returns `None` if no subscriber records it.
pub(crate) fn span() -> Option<Box<Span>> {
    let span = tracing::debug_span!(
        target: TARGET,
        "idempotency",
        outcome = tracing::field::Empty,
        attempt = tracing::field::Empty,
        fence = tracing::field::Empty,
    );
    (!span.is_disabled()).then(|| Box::new(span))
}

/// Records an attempt in the span of its request.
pub(crate) fn granted(span: Option<&Span>, attempt: u32, fence: u64) {
    if let Some(span) = span {
        span.record("attempt", attempt).record("fence", fence);
    }
}

/// Records the outcome in the span of its request, and counts it.
pub(crate) fn finished(span: Option<&Span>, outcome: &'static str) {
    if let Some(span) = span {
        span.record("outcome", outcome);
    }
    count_request(outcome);
}

#[cfg(feature = "metrics")]
pub(crate) use with_metrics::{Times, count_event, count_message, count_request, in_flight, store_figures};
#[cfg(not(feature = "metrics"))]
pub(crate) use without_metrics::{Times, count_event, count_message, count_request, in_flight, store_figures};

#[cfg(all(feature = "metrics", feature = "webhooks"))]
use with_metrics::count_webhook_rejected;
#[cfg(all(not(feature = "metrics"), feature = "webhooks"))]
use without_metrics::count_webhook_rejected;

#[cfg(feature = "metrics")]
mod with_metrics {
    use metrics::{counter, gauge, histogram};

    use super::{Duration, Event};
    use crate::clock::Stopwatch;

    pub(crate) fn count_event(event: Event) {
        counter!("idempotency_events_total", "event" => event.name()).increment(1);
    }

    pub(crate) fn count_message(outcome: &'static str) {
        counter!("idempotency_messages_total", "outcome" => outcome).increment(1);
    }

    pub(crate) fn count_request(outcome: &'static str) {
        counter!("idempotency_requests_total", "outcome" => outcome).increment(1);
    }

    #[cfg(feature = "webhooks")]
    pub(crate) fn count_webhook_rejected(reason: &'static str) {
        counter!("idempotency_webhooks_rejected_total", "reason" => reason).increment(1);
    }

    pub(crate) fn in_flight(change: f64) {
        gauge!("idempotency_in_flight").increment(change);
    }

    pub(crate) fn store_figures(records: u64, bytes: u64, in_flight: u64, waiters: u64) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a gauge is a float; 2^53 records do not fit in memory"
        )]
        let set = |name, value: u64| gauge!("idempotency_store_".to_owned() + name).set(value as f64);
        set("records", records);
        set("bytes", bytes);
        set("in_flight", in_flight);
        set("waiters", waiters);
    }

    /// The times that a request spends in the layer, in its handler, and waiting.
    #[derive(Debug)]
    pub(crate) struct Times {
        started: Stopwatch,
        elsewhere: Duration,
    }

    impl Times {
        pub(crate) fn start() -> Self {
            Self {
                started: Stopwatch::start(),
                elsewhere: Duration::ZERO,
            }
        }

        pub(crate) async fn waiting<F: Future>(&mut self, waiting: F) -> F::Output {
            let waited = Stopwatch::start();
            let output = self.outside(waiting).await;
            histogram!("idempotency_wait_seconds").record(waited.elapsed().as_secs_f64());
            output
        }

        pub(crate) async fn outside<F: Future>(&mut self, handler: F) -> F::Output {
            let _outside = Outside(&mut self.elsewhere, Stopwatch::start());
            handler.await
        }
    }

    /// Adds the time until its drop to the time outside of the layer. A drop also counts a handler
    /// that panics and a caller that leaves.
    struct Outside<'t>(&'t mut Duration, Stopwatch);

    impl Drop for Outside<'_> {
        fn drop(&mut self) {
            *self.0 += self.1.elapsed();
        }
    }

    impl Drop for Times {
        fn drop(&mut self) {
            let inside = self.started.elapsed().saturating_sub(self.elsewhere);
            histogram!("idempotency_layer_seconds").record(inside.as_secs_f64());
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod without_metrics {

    use super::Event;

    pub(crate) const fn count_event(_: Event) {}

    pub(crate) const fn count_message(_: &'static str) {}

    pub(crate) const fn count_request(_: &'static str) {}

    #[cfg(feature = "webhooks")]
    pub(crate) const fn count_webhook_rejected(_: &'static str) {}

    pub(crate) const fn in_flight(_: f64) {}

    pub(crate) const fn store_figures(_: u64, _: u64, _: u64, _: u64) {}

    /// Measures nothing without the feature `metrics`.
    #[derive(Debug)]
    pub(crate) struct Times;

    impl Times {
        pub(crate) const fn start() -> Self {
            Self
        }

        #[expect(
            clippy::unused_self,
            reason = "the same calls are measured with the feature `metrics`"
        )]
        pub(crate) fn waiting<F: Future>(&mut self, waiting: F) -> F {
            waiting
        }

        #[expect(
            clippy::unused_self,
            reason = "the same calls are measured with the feature `metrics`"
        )]
        pub(crate) fn outside<F: Future>(&mut self, handler: F) -> F {
            handler
        }
    }
}
