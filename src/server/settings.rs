//! The settings of a layer, in one value that clones of the layer share until one of them changes
//! it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, response};

use super::errors::ServiceErrors;
use super::policy::{RecoveryCheck, StorePolicy, Verdict};
use crate::callback::Callback;
use crate::engine::EngineSettings;
use crate::http::{Fingerprinting, IDEMPOTENCY_KEY, Rendering, ResponseHeaders, StreamTypes};
use crate::protocol::{IfLost, KeyParser, Scope};

/// The settings of a layer, for the selector of
/// [`with_settings_for`](super::IdempotencyLayer::with_settings_for).
/// [`IdempotencyLayer::settings`](super::IdempotencyLayer::settings) returns them. Clones share one
/// value.
#[derive(Clone, Debug)]
pub struct Settings {
    pub(super) values: Arc<Values>,
    /// The settings for single paths, which take precedence over `values`.
    pub(super) paths: Option<Arc<Paths>>,
}

/// Settings by the path of the request's `uri`.
pub(super) type Paths = HashMap<String, Arc<Values>>;

/// Chooses the settings for a request by its head. Returns `None` for a request that the layer does
/// not cover.
pub(super) type Selector = Arc<dyn Fn(&Parts) -> Option<Settings> + Send + Sync>;

/// Returns the scope of a request by its head; `None` if the request has none.
pub(super) type ScopeFn = Callback<dyn Fn(&Parts) -> Option<Scope> + Send + Sync>;

#[derive(Clone, Debug)]
pub(super) struct Values {
    pub(super) header: HeaderName,
    pub(super) parser: KeyParser,
    pub(super) engine: EngineSettings,
    pub(super) required: bool,
    pub(super) methods: Vec<Method>,
    pub(super) scope: Option<ScopeFn>,
    pub(super) fingerprinting: Fingerprinting,
    pub(super) body_limit: usize,
    pub(super) body_timeout: Duration,
    pub(super) response_limit: usize,
    pub(super) response_timeout: Duration,
    pub(super) streams: StreamTypes,
    pub(super) policy: StorePolicy,
    pub(super) errors: ServiceErrors,
    /// The check under [`IfLost::Recover`].
    pub(super) check: Option<RecoveryCheck>,
    pub(super) response_headers: ResponseHeaders,
    /// Whether a 2xx acknowledges a delivery, as for webhooks. The layer then returns no response
    /// without a record. If the response of a success was not stored, a duplicate gets a bare 200
    /// instead of a refusal.
    pub(super) acknowledges: bool,
    pub(super) refusals: Rendering,
    pub(super) waiting: Waiting,
    pub(super) retry_after: Duration,
    pub(super) run_unprotected: bool,
}

/// The maximum numbers of duplicates that wait in this process: for one key, and for all keys
/// together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) per_key: usize,
    pub(super) in_all: usize,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            header: IDEMPOTENCY_KEY,
            parser: KeyParser::default(),
            engine: EngineSettings::default(),
            required: false,
            methods: vec![Method::POST, Method::PATCH],
            scope: None,
            fingerprinting: Fingerprinting::default(),
            body_limit: 2 << 20,
            body_timeout: Duration::from_secs(30),
            response_limit: 2 << 20,
            response_timeout: Duration::from_secs(10),
            streams: StreamTypes::default(),
            policy: StorePolicy::default(),
            errors: ServiceErrors::default(),
            check: None,
            response_headers: ResponseHeaders::default(),
            acknowledges: false,
            refusals: Rendering::default(),
            waiting: Waiting {
                per_key: 16_384,
                in_all: 65_536,
            },
            retry_after: Duration::from_secs(1),
            run_unprotected: false,
        }
    }
}

impl Settings {
    /// Returns the settings for this path alone.
    pub(super) fn of_path(&self, path: &str) -> Option<Arc<Values>> {
        self.paths.as_ref()?.get(path).cloned()
    }

    /// Returns the settings for a request with this path.
    pub(super) fn for_path(self, path: &str) -> Arc<Values> {
        self.of_path(path).unwrap_or(self.values)
    }
}

impl Values {
    pub(super) fn set_header(&mut self, name: HeaderName) {
        self.refusals.header = (name != IDEMPOTENCY_KEY).then(|| Box::new(name.clone()));
        self.header = name;
    }

    /// Adds the should-retry field, with the value `false`, to a failed response after which no
    /// retry can run, so that the client's SDK does not send the request again in vain. The layer
    /// stores the field with the response.
    pub(super) fn advise(&self, head: &mut response::Parts, can_run_again: bool) {
        let Some(name) = &self.refusals.should_retry else {
            return;
        };
        let is_failure = head.status.is_client_error() || head.status.is_server_error();
        if is_failure && !can_run_again {
            // If the header map is full, the response does not get the field.
            drop(head.headers.try_insert(name.clone(), HeaderValue::from_static("false")));
        }
    }

    /// Whether a retry can run the handler, after an attempt with this number has ended with this
    /// verdict.
    pub(super) fn can_run_again(&self, verdict: Verdict, retention: Duration, attempt: u32) -> bool {
        // A retry takes the key over, or calls the recovery check first.
        let can_take_over = self.engine.if_lost != IfLost::Refuse && attempt < self.engine.max_attempts;
        match verdict {
            // Without a retention, the store forgets every end.
            _ if retention.is_zero() => true,
            // If an earlier attempt was lost, its evidence stays.
            Verdict::Release => attempt == 1 || can_take_over,
            Verdict::GiveUp => can_take_over,
            Verdict::Store | Verdict::Tombstone | Verdict::Unjudged => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a duration as the tables of the docs write it.
    fn written(duration: Duration) -> String {
        match duration.as_secs() {
            0 => "none".to_owned(),
            seconds if seconds % 86_400 == 0 && seconds > 86_400 => format!("{} days", seconds / 86_400),
            seconds if seconds % 3_600 == 0 => format!("{} h", seconds / 3_600),
            seconds => format!("{seconds} s"),
        }
    }

    fn thousands(number: usize) -> String {
        format!("{},{:03}", number / 1_000, number % 1_000)
    }

    fn assert_table(source: &str, rows: &[(&str, String)]) {
        for (setting, default) in rows {
            let mut lines = source.lines().filter(|line| line.starts_with("/// |"));
            let is_there = lines.any(|line| line.contains(setting) && line.contains(default.as_str()));
            assert!(is_there, "no row has {setting:?} and {default:?}");
        }
    }

    #[test]
    fn the_tables_of_defaults_are_true() {
        let values = Values::default();
        let engine = &values.engine;
        assert_eq!(engine.if_lost, IfLost::Refuse);
        let mebibytes = |bytes: usize| format!("{} MiB", bytes >> 20);
        assert_table(
            include_str!("layer.rs"),
            &[
                ("| body limits |", mebibytes(values.body_limit)),
                (
                    "| body limits |",
                    format!("{} for stored", mebibytes(values.response_limit)),
                ),
                (
                    "| body timeouts |",
                    format!("{} for requests", written(values.body_timeout)),
                ),
                (
                    "| body timeouts |",
                    format!("{} for responses", written(values.response_timeout)),
                ),
                (
                    "| a lost attempt |",
                    format!("at most {} attempts", engine.max_attempts),
                ),
                ("| duplicates in flight |", format!("up to {},", written(engine.wait))),
                (
                    "| duplicates in flight |",
                    format!("{} for a key", thousands(values.waiting.per_key)),
                ),
                (
                    "| duplicates in flight |",
                    format!("{} in all", thousands(values.waiting.in_all)),
                ),
                ("| executions whose callers left |", thousands(engine.max_detached)),
                (
                    "| retention |",
                    format!("{} from completion", written(engine.retention)),
                ),
                ("| lease |", format!("{},", written(engine.lease))),
                (
                    "| the store fails |",
                    format!("{} for each operation", written(engine.store_timeout)),
                ),
                (
                    "| the store fails |",
                    format!("repeated for {},", written(engine.completion_timeout)),
                ),
            ],
        );
    }

    #[test]
    fn the_tables_of_the_client_and_the_receiver_are_true() {
        let engine = EngineSettings::default();
        assert_table(
            include_str!("../client/once/http/layer.rs"),
            &[
                ("[lease]", format!("{},", written(engine.lease))),
                (
                    "[retention]",
                    format!("{} from the completion", written(engine.retention)),
                ),
                ("[wait]", written(engine.wait)),
                ("[attempts]", format!("| {} |", engine.max_attempts)),
            ],
        );
        assert_table(
            include_str!("../receiver/layer.rs"),
            &[
                ("[lease]", format!("{},", written(engine.lease))),
                ("[attempts]", format!("| {} |", engine.max_attempts)),
            ],
        );
    }
}
