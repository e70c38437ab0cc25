//! Request bodies that can be sent again.

use bytes::Buf;
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{Either, Empty, Full};

use crate::http::BufferedBody;

/// A request body that the client may be able to send more than once.
///
/// If a body cannot be cloned, the policy sends its request only once, and the caller gets the
/// result of that attempt.
pub trait CloneBody: Sized {
    /// Returns a copy of the body, or `None` if it can be sent only once, like a stream.
    fn try_clone(&self) -> Option<Self>;
}

impl<D: Buf + Clone> CloneBody for Full<D> {
    fn try_clone(&self) -> Option<Self> {
        Some(self.clone())
    }
}

impl<D> CloneBody for Empty<D> {
    fn try_clone(&self) -> Option<Self> {
        Some(Self::new())
    }
}

impl CloneBody for String {
    fn try_clone(&self) -> Option<Self> {
        Some(self.clone())
    }
}

impl CloneBody for () {
    fn try_clone(&self) -> Option<Self> {
        Some(())
    }
}

impl<L: CloneBody, R: CloneBody> CloneBody for Either<L, R> {
    fn try_clone(&self) -> Option<Self> {
        match self {
            Self::Left(left) => left.try_clone().map(Self::Left),
            Self::Right(right) => right.try_clone().map(Self::Right),
        }
    }
}

impl<B: CloneBody> CloneBody for BufferedBody<B> {
    fn try_clone(&self) -> Option<Self> {
        self.try_clone_with(B::try_clone)
    }
}

impl<D, E> CloneBody for BoxBody<D, E> {
    /// Returns `None`, because the box hides the body.
    fn try_clone(&self) -> Option<Self> {
        None
    }
}

impl<D, E> CloneBody for UnsyncBoxBody<D, E> {
    /// Returns `None`, because the box hides the body.
    fn try_clone(&self) -> Option<Self> {
        None
    }
}

#[cfg(feature = "reqwest")]
impl CloneBody for reqwest::Body {
    fn try_clone(&self) -> Option<Self> {
        self.as_bytes()
            .map(|bytes| Self::from(bytes::Bytes::copy_from_slice(bytes)))
    }
}
