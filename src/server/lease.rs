//! The attempt under which a handler runs.

use std::fmt;
use std::sync::Arc;
#[cfg(feature = "testing")]
use std::time::Duration;

use super::guard::KeyGuard;
use super::settings::Values;
use super::singleflight::InFlight;
#[cfg(feature = "postgres")]
use super::transaction_context::TransactionContext;
#[cfg(feature = "testing")]
use crate::protocol::Fingerprint;
use crate::protocol::{Fence, Grant, IdempotencyKey, Owner, StorageKey};
use crate::store::Store;

/// The attempt under which a handler runs. It is an extension of every guarded request, and an axum
/// extractor (feature `axum`). Unit tests of handlers make one with `testing::TestLease` (feature
/// `testing`).
///
/// ```
/// use tower_idempotency::Lease;
///
/// async fn pay<B>(request: http::Request<B>) {
///     if let Some(lease) = request.extensions().get::<Lease>() {
///         let key_for_the_bank = lease.derive_key("charge");
///         println!("attempt {} calls the bank with {} bytes of key", lease.attempt().number(), key_for_the_bank.len());
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Lease {
    in_flight: Arc<InFlight>,
    grant: Grant,
    /// The lease of an outer layer.
    outer: Option<Arc<Lease>>,
    #[cfg(feature = "postgres")]
    transaction_context: TransactionContext,
}

impl Lease {
    #[cfg_attr(
        not(feature = "postgres"),
        expect(unused_variables, reason = "only transactions need the settings")
    )]
    pub(super) fn new<St: Store>(key_guard: &KeyGuard<St>, settings: &Arc<Values>, grant: Grant) -> Self {
        Self {
            in_flight: Arc::clone(&key_guard.in_flight),
            grant,
            outer: None,
            #[cfg(feature = "postgres")]
            transaction_context: TransactionContext::new(&key_guard.shared, settings),
        }
    }

    /// Returns a lease for a test of an application's handler.
    #[cfg(feature = "testing")]
    pub(crate) fn made(key: IdempotencyKey, made: &crate::engine::Made) -> Self {
        let in_flight = InFlight::new(key, made.storage_key, Fingerprint::NONE, Duration::ZERO).granted(made.grant);
        if made.is_superseded {
            in_flight.set_superseded();
        }
        Self {
            in_flight: Arc::new(in_flight),
            grant: made.grant,
            outer: None,
            #[cfg(feature = "postgres")]
            transaction_context: TransactionContext::made(made),
        }
    }

    /// Returns this lease with a link to `outer`, the lease of an outer layer.
    pub(super) fn within(mut self, outer: Option<Self>) -> Self {
        self.outer = outer.map(Arc::new);
        self
    }

    /// Whether `test` returns `true` for this lease or for a lease of an outer layer.
    pub(super) fn any(&self, mut test: impl FnMut(&Self) -> bool) -> bool {
        let mut lease = Some(self);
        while let Some(this) = lease {
            if test(this) {
                return true;
            }
            lease = this.outer.as_deref();
        }
        false
    }

    /// Returns the owners of this storage key among this lease and the leases of outer layers, in
    /// any store.
    pub(super) fn owners_of(&self, key: &StorageKey) -> Vec<Owner> {
        let mut owners = Vec::new();
        self.any(|lease| {
            if lease.storage_key() == key {
                owners.push(lease.owner());
            }
            false
        });
        owners
    }

    #[cfg(feature = "postgres")]
    pub(super) const fn transaction_context(&self) -> &TransactionContext {
        &self.transaction_context
    }

    pub(super) const fn in_flight(&self) -> &Arc<InFlight> {
        &self.in_flight
    }

    /// Returns the client's key.
    #[must_use]
    pub fn key(&self) -> &IdempotencyKey {
        &self.in_flight.key
    }

    /// Returns the fence, which grows with every attempt under a key. Pass the fence to a third
    /// party that can refuse an older fence.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.grant.owner.fence
    }

    /// Returns the name of the record in the store.
    #[must_use]
    pub fn storage_key(&self) -> &StorageKey {
        &self.in_flight.storage_key
    }

    /// Returns the nonce and the fence. A custom store needs them and the [storage
    /// key](Self::storage_key) to complete a key within a transaction.
    #[must_use]
    pub const fn owner(&self) -> Owner {
        self.grant.owner
    }

    /// Returns the number of this attempt.
    #[must_use]
    pub const fn attempt(&self) -> AttemptNumber {
        AttemptNumber(self.grant.attempt)
    }

    /// Returns whether this attempt still held the key at the last renewal. If another attempt has
    /// taken the key over since then, the layer discards the response of this attempt. If this
    /// method returns `false` but no other attempt has taken the key over, the layer can still store
    /// the response.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.in_flight.is_superseded()
    }

    /// Returns a key for a call to a third party, as 64 hexadecimal digits. The key is the same in
    /// every attempt under this key and request, differs for each `step`, and does not reveal the
    /// client's key.
    ///
    /// If the third party deduplicates by this key, the call takes effect once, even if the handler
    /// runs again.
    #[must_use]
    pub fn derive_key(&self, step: &str) -> String {
        self.in_flight.derived_keys().key(step)
    }

    /// Returns [`derive_key`](Self::derive_key) as a UUID (version 8, RFC 9562 section 5.8) of 36
    /// characters, for a third party that accepts ids from its clients, or only short keys.
    #[must_use]
    pub fn derive_id(&self, step: &str) -> String {
        self.in_flight.derived_keys().id(step)
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("fence", &self.fence())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}

/// The number of an attempt under a key: 1 for the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptNumber(u32);

impl AttemptNumber {
    /// Returns the number of the attempt, from 1.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns whether no earlier attempt was lost. An attempt that failed and released its key
    /// does not count.
    #[must_use]
    pub const fn is_first(self) -> bool {
        self.0 == 1
    }
}

#[cfg(feature = "axum")]
mod extract {
    use std::convert::Infallible;

    use axum::extract::{FromRequestParts, OptionalFromRequestParts};
    use axum::response::{IntoResponse, Response};
    use http::HeaderName;
    use http::request::Parts;

    use super::{AttemptNumber, Lease};
    use crate::http::{IDEMPOTENCY_KEY, Refusal, RefusalKind, Rendering};
    use crate::protocol::IdempotencyKey;

    /// The name of the header field with the key. A layer that passes a request on adds it to the
    /// extensions, if the name is not `Idempotency-Key`.
    #[derive(Clone)]
    pub(in crate::server) struct KeyHeader(pub(in crate::server) HeaderName);

    /// The rejection of a [`Lease`], an [`AttemptNumber`] or an [`IdempotencyKey`] as an extractor,
    /// if no [`IdempotencyLayer`](crate::IdempotencyLayer) guards the request.
    ///
    /// A request without a key gets 400. A request with a key gets 500, because the application
    /// does not cover its route or method. The rejection looks for the key in the header field of
    /// the layer that passed the request on. Without such a layer, it looks in `Idempotency-Key`.
    /// The response names that field.
    #[derive(Clone, Debug)]
    pub struct LeaseRejection {
        has_key: bool,
        /// The header field with the key, if it is not `Idempotency-Key`.
        header: Option<Box<HeaderName>>,
    }

    impl LeaseRejection {
        fn new(parts: &Parts) -> Self {
            let header = parts.extensions.get::<KeyHeader>();
            let header = header.map(|KeyHeader(name)| Box::new(name.clone()));
            Self {
                has_key: parts
                    .headers
                    .contains_key(header.as_deref().unwrap_or(&IDEMPOTENCY_KEY)),
                header,
            }
        }
    }

    impl IntoResponse for LeaseRejection {
        fn into_response(self) -> Response {
            let kind = if self.has_key {
                RefusalKind::NotCovered
            } else {
                RefusalKind::MissingKey
            };
            let rendering = Rendering {
                header: self.header,
                ..Rendering::default()
            };
            Refusal::new(kind).into_response(&rendering, None)
        }
    }

    impl std::fmt::Display for LeaseRejection {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            if self.has_key {
                return f.write_str("the route or method is not covered by an IdempotencyLayer");
            }
            let header = self.header.as_deref().map_or("Idempotency-Key", HeaderName::as_str);
            write!(f, "the request has no idempotency key in the header field {header}")
        }
    }

    impl std::error::Error for LeaseRejection {}

    macro_rules! extractor {
        ($type:ty, $from:expr) => {
            impl<S: Sync> FromRequestParts<S> for $type {
                type Rejection = LeaseRejection;

                async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, LeaseRejection> {
                    parts
                        .extensions
                        .get::<Lease>()
                        .map($from)
                        .ok_or_else(|| LeaseRejection::new(parts))
                }
            }

            impl<S: Sync> OptionalFromRequestParts<S> for $type {
                type Rejection = Infallible;

                async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
                    Ok(parts.extensions.get::<Lease>().map($from))
                }
            }
        };
    }

    extractor!(Lease, Lease::clone);
    extractor!(AttemptNumber, Lease::attempt);
    extractor!(IdempotencyKey, |lease: &Lease| lease.key().clone());
}

#[cfg(feature = "axum")]
pub(super) use extract::KeyHeader;
#[cfg(feature = "axum")]
pub use extract::LeaseRejection;
