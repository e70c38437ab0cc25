//! Bodies that can be sent again.

use bytes::Buf;
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{Either, Empty, Full};

use crate::http::Body;

/// A body that can perhaps be sent more than once.
///
/// A request whose body cannot be cloned is sent once, and its answer given as it is.
pub trait CloneBody: Sized {
    /// The same body again; `None`: it can be sent only once, a stream for example.
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

impl<B: CloneBody> CloneBody for Body<B> {
    fn try_clone(&self) -> Option<Self> {
        self.try_clone_with(B::try_clone)
    }
}

impl<D, E> CloneBody for BoxBody<D, E> {
    /// Nobody knows what is in the box.
    fn try_clone(&self) -> Option<Self> {
        None
    }
}

impl<D, E> CloneBody for UnsyncBoxBody<D, E> {
    /// Nobody knows what is in the box.
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
