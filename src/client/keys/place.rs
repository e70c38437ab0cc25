//! Where a key goes: into a header field, or into the body.

use std::fmt;

use bytes::Bytes;
use http::header::{HeaderValue, MaxSizeReached};
use http::Request;

use super::derive::KeyOrigin;
use super::maker::Cause;
use super::profile::ProviderProfile;
use crate::clock::{http_date, http_date_of};
use crate::protocol::{quoted, InvalidKey, KeyError, KeyParser, KeySyntax};

/// Where the key of a request goes: [`InHeader`], the default, or [`InBody`].
pub trait KeyPlacement<B> {
    /// Whether the caller has set a key.
    ///
    /// # Errors
    ///
    /// When the caller has set one that the server would not take.
    fn is_placed(&self, profile: &ProviderProfile, request: &Request<B>) -> Result<bool, KeyError>;

    /// Puts the key into the request.
    ///
    /// # Errors
    ///
    /// Whatever hinders it; nothing is sent then.
    fn place(
        &self,
        profile: &ProviderProfile,
        request: &mut Request<B>,
        key: &str,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// The key goes into the header field of the [`ProviderProfile`].
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
        syntax: KeySyntax::Lenient,
        max_len: profile.max_len,
        validator: None,
    }
}

/// The error of a request whose first attempt has no known date.
#[derive(Debug)]
pub(super) struct NoFirstSent;

/// Sets the date of the first attempt, if the server requires one and the caller has not set it. Takes the date from
/// the request's [`KeyOrigin`], or uses the present date if the key `is_new`. A process that crashed may have sent any
/// other key before.
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

/// The key goes into the body, by a function that knows its form: a field of a JSON object, as Square has it. Made by
/// [`IdempotencyKeyLayer::with_body_key`](super::IdempotencyKeyLayer::with_body_key).
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

/// Extension of a request whose key is in its body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IsKeyed;
