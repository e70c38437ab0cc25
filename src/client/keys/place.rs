//! The placement of a key: in a header field or in the body.

use std::fmt;

use bytes::Bytes;
use http::Request;
use http::header::{HeaderValue, MaxSizeReached};

use super::derive::KeyOrigin;
use super::generator::Cause;
use super::profile::ProviderProfile;
use crate::clock::{http_date, http_date_of};
use crate::protocol::{InvalidKey, KeyError, KeyParser, KeySyntax, quoted};

/// The placement of a request's key: [`InHeader`], the default, or [`InBody`].
pub trait KeyPlacement<B> {
    /// Returns whether the caller has set a key.
    ///
    /// # Errors
    ///
    /// If the caller has set a key that the server would reject.
    fn is_placed(&self, profile: &ProviderProfile, request: &Request<B>) -> Result<bool, KeyError>;

    /// Adds the key to the request.
    ///
    /// # Errors
    ///
    /// Any error that prevents adding the key. The request is not sent.
    fn place(
        &self,
        profile: &ProviderProfile,
        request: &mut Request<B>,
        key: &str,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Puts the key into the header field of the [`ProviderProfile`].
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct InHeader;

impl<B> KeyPlacement<B> for InHeader {
    fn is_placed(&self, profile: &ProviderProfile, request: &Request<B>) -> Result<bool, KeyError> {
        let mut lines = request.headers().get_all(&profile.header).iter();
        let Some(value) = lines.next() else {
            return Ok(false);
        };
        if lines.next().is_some() {
            return Err(KeyError::new(InvalidKey::Repeated));
        }
        parser(profile).check_value(value.as_bytes()).map(|()| true)
    }

    fn place(&self, profile: &ProviderProfile, request: &mut Request<B>, key: &str) -> Result<(), Cause> {
        parser(profile).check(key)?;
        let mut value = if profile.quoted {
            HeaderValue::from_maybe_shared(Bytes::from(quoted(key)))?
        } else {
            HeaderValue::from_str(key)?
        };
        value.set_sensitive(true);
        request.headers_mut().try_insert(&profile.header, value)?;
        Ok(())
    }
}

fn parser(profile: &ProviderProfile) -> KeyParser {
    KeyParser {
        // A server without quoted keys reads quotes as a part of the key.
        syntax: if profile.quoted {
            KeySyntax::Lenient
        } else {
            KeySyntax::Raw
        },
        max_len: profile.max_len,
        validator: None,
    }
}

/// The error of a request whose first attempt has no known date.
#[derive(Debug)]
pub(super) struct NoFirstSent;

/// Sets the date of the first attempt, if the server requires one and the caller has not set it.
/// Takes the date from the request's [`KeyOrigin`]. Without one, uses the present date if the key
/// `is_new`, because a process that crashed may have sent any other key before.
pub(super) fn place_first_sent<B>(
    profile: &ProviderProfile,
    request: &mut Request<B>,
    is_new: bool,
) -> Result<(), NoFirstSent> {
    let Some(name) = &profile.first_sent else {
        return Ok(());
    };
    if request.headers().contains_key(name) {
        return Ok(());
    }
    let origin = request.extensions().get::<KeyOrigin>();
    let date = match origin.and_then(|origin| origin.first_sent) {
        Some(time) => http_date_of(time),
        None => is_new.then(http_date),
    };
    let date = date.and_then(|date| HeaderValue::from_maybe_shared(Bytes::from(date)).ok());
    let date = date.ok_or(NoFirstSent)?;
    let placed = request.headers_mut().try_insert(name.clone(), date);
    placed.map(drop).map_err(|_: MaxSizeReached| NoFirstSent)
}

/// Puts the key into the body with a function that knows the form of the body, such as a member of
/// a JSON object for Square.
/// [`IdempotencyKeyLayer::with_body_key`](super::IdempotencyKeyLayer::with_body_key) makes it.
#[derive(Clone)]
pub struct InBody<F>(pub(super) F);

impl<B, F, E> KeyPlacement<B> for InBody<F>
where
    F: Fn(&mut Request<B>, &str) -> Result<(), E>,
    E: Into<Cause>,
{
    fn is_placed(&self, _: &ProviderProfile, _: &Request<B>) -> Result<bool, KeyError> {
        Ok(false)
    }

    fn place(&self, profile: &ProviderProfile, request: &mut Request<B>, key: &str) -> Result<(), Cause> {
        parser(profile).check(key)?;
        (self.0)(request, key).map_err(Into::into)?;
        request.extensions_mut().insert(IsKeyed);
        Ok(())
    }
}

impl<F> fmt::Debug for InBody<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InBody(..)")
    }
}

/// An extension of a request whose key is in its body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IsKeyed;
