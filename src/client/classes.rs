//! Classes of client errors, by the effect of the request.

use std::any::Any;

#[cfg(feature = "reqwest")]
use super::keys::KeyPlacementError;
use crate::error::Classifiers;

/// The class of a client's error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a classifier must know every case")]
pub enum ErrorClass {
    /// Nothing was sent and nothing ever will be, for example because the URL is invalid. The
    /// request is not repeated.
    Final,
    /// The request may have been sent and may have taken effect, for example before a reset
    /// connection or a timeout. The default for every error.
    Lost,
    /// Nothing was sent this time, for example because the connection was refused.
    NotSent,
}

/// The classes that the application has set for the errors of its client.
#[derive(Clone, Debug, Default)]
pub(super) struct ErrorClasses(Classifiers<ErrorClass>);

impl ErrorClasses {
    pub(super) fn add<E: 'static>(&mut self, classify: impl Fn(&E) -> ErrorClass + Send + Sync + 'static) {
        self.0.add(classify);
    }

    /// Classifies an error by the application's functions. If none of them knows the error and the
    /// client `is_vouched` for, classifies it by its type. A client that nobody vouches for may
    /// have followed a redirect first, and an error of `reqwest` does not show that.
    pub(super) fn of<E: 'static>(&self, error: &E, is_vouched: bool) -> ErrorClass {
        let known = || is_vouched.then(|| known(error)).flatten();
        self.0.of(error).or_else(known).unwrap_or(ErrorClass::Lost)
    }
}

#[cfg(feature = "reqwest")]
fn known(error: &dyn Any) -> Option<ErrorClass> {
    let error = match error.downcast_ref() {
        Some(KeyPlacementError::Service(error)) => error,
        _ => error.downcast_ref::<reqwest::Error>()?,
    };
    Some(match error {
        error if error.is_builder() => ErrorClass::Final,
        error if error.is_connect() => ErrorClass::NotSent,
        _ => ErrorClass::Lost,
    })
}

#[cfg(not(feature = "reqwest"))]
fn known(_: &dyn Any) -> Option<ErrorClass> {
    None
}
