//! Marks on a gRPC status, so that a handler can set marks on an error.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use http::{Extensions, response};
use tonic::Status;

/// Sets marks on a [`tonic::Status`]. A status has no extensions, unlike a response.
///
/// A mark tells the layer how to treat this one response. Examples are
/// [`StoreResponse`](crate::StoreResponse), [`DoNotStore`](crate::DoNotStore) and
/// [`StoreFor`](crate::StoreFor). A mark stays in the process, so the client never sees it. On a
/// [`tonic::Response`], insert the mark into [`extensions_mut`](tonic::Response::extensions_mut)
/// instead.
///
/// A mark takes effect on a status that a method returns as its error. It has no effect on a status
/// that ends a stream of messages, because tonic sends only the fields of that status.
///
/// The source of the status holds the marks. Therefore set a source of your own first, because
/// [`Status::set_source`] after `with_mark` removes all marks. A status that you make from an error
/// has only its own marks, even if the error wraps a status with marks.
///
/// ```
/// use tonic::Status;
/// use tower_idempotency::{DoNotStore, MarkStatus};
///
/// fn charge(is_closed: bool) -> Result<tonic::Response<()>, Status> {
///     if is_closed {
///         // The bank opens again tomorrow, so the next attempt runs.
///         return Err(Status::failed_precondition("the bank is closed").with_mark(DoNotStore));
///     }
///     Ok(tonic::Response::new(()))
/// }
/// # assert!(charge(true).is_err());
/// ```
pub trait MarkStatus: sealed::Sealed {
    /// Adds a mark, which replaces an earlier mark of the same type. [`Status::set_source`] removes
    /// all marks, so call it before this method.
    #[must_use]
    fn with_mark<M: Clone + Send + Sync + 'static>(self, mark: M) -> Self;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for tonic::Status {}
}

impl MarkStatus for Status {
    fn with_mark<M: Clone + Send + Sync + 'static>(mut self, mark: M) -> Self {
        let marked = marked(&self);
        let (mut marks, status) = match marked {
            Some(Marked { marks, status }) => (marks.clone(), status.clone()),
            None => (Extensions::new(), self.clone()),
        };
        marks.insert(mark);
        self.set_source(Arc::new(Marked { marks, status }));
        self
    }
}

/// The source of a status with marks. It replaces the source that the status had before.
#[derive(Debug)]
struct Marked {
    marks: Extensions,
    /// A copy of the status without marks, which owns the original source.
    status: Status,
}

impl fmt::Display for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status.source() {
            Some(source) => fmt::Display::fmt(source, f),
            None => f.write_str("the status carries marks"),
        }
    }
}

impl Error for Marked {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.status.source().and_then(Error::source)
    }
}

fn marked(status: &Status) -> Option<&Marked> {
    status.source()?.downcast_ref()
}

/// Adds the marks of a status to the extensions of its response, where the layer looks for them.
/// tonic puts the status of a response without messages into the extensions.
pub(crate) fn add_marks(head: &mut response::Parts) {
    let marked = head.extensions.get::<Status>().and_then(marked);
    if let Some(Marked { marks, .. }) = marked {
        let marks = marks.clone();
        head.extensions.extend(marks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct One(u8);

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Two;

    #[test]
    fn marks_reach_the_response_and_none_of_its_fields() {
        let plain = Status::unavailable("later").into_http::<()>();
        let marked = Status::unavailable("later")
            .with_mark(One(1))
            .with_mark(Two)
            .with_mark(One(2));
        let (mut head, ()) = marked.into_http::<()>().into_parts();
        add_marks(&mut head);
        assert_eq!(head.extensions.get::<One>(), Some(&One(2)));
        assert_eq!(head.extensions.get::<Two>(), Some(&Two));
        assert_eq!(&head.headers, plain.headers());
    }

    #[test]
    fn a_later_source_and_a_wrapping_error_remove_the_marks() {
        let marks_of = |status: Status| {
            let (mut head, ()) = status.into_http::<()>().into_parts();
            add_marks(&mut head);
            head.extensions.get::<Two>().copied()
        };
        let with_source = |mut status: Status| {
            status.set_source(Arc::new(fmt::Error));
            status
        };
        let marked = || Status::internal("broken").with_mark(Two);
        assert_eq!(
            marks_of(with_source(Status::internal("broken")).with_mark(Two)),
            Some(Two)
        );
        assert_eq!(marks_of(with_source(marked())), None);
        let mut wrapping = Status::internal("wrapped");
        wrapping.set_source(Arc::new(marked()));
        assert_eq!(marks_of(wrapping), None);
    }

    #[test]
    fn the_source_of_a_status_can_still_be_seen() {
        let mut status = Status::internal("broken");
        status.set_source(Arc::new(fmt::Error));
        let status = status.with_mark(Two).with_mark(One(1));
        assert_eq!(status.source().unwrap().to_string(), fmt::Error.to_string());
        assert_eq!(status.message(), "broken");
        // The source has a source, too.
        let mut wrapping = Status::internal("wrapped");
        wrapping.set_source(Arc::new(status));
        let source = wrapping.source().unwrap().source().unwrap().to_string();
        assert_eq!(source, fmt::Error.to_string());
        let marked = wrapping.with_mark(Two);
        assert_eq!(marked.source().unwrap().source().unwrap().to_string(), source);
    }
}
