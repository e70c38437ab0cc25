//! Reads request bodies and detects that one was cut off, so that it does not count as a shorter
//! body.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::RefusalKind;
use super::body::{BodyBounds, Collect, Shortfall, collect};

/// Reads the body of a request to its end, within its bounds.
pub(crate) fn collect_request<B: HttpBody<Data = Bytes> + Unpin>(body: B, bounds: BodyBounds) -> Collect<Checked<B>> {
    let checked = Checked {
        body,
        end: End::NotSeen,
    };
    collect(checked, bounds.bytes, bounds.timeout)
}

/// The body of a request, which confirms its end.
///
/// A body can end without an error although its client has not sent all of it. hyper ends the body
/// of an HTTP/2 request in this way if the client resets the stream with `NO_ERROR`, as proxies do
/// when their own client leaves. If the request declared its length, [`collect`] notices that the
/// body was cut off. Otherwise, if the inner body does not confirm its end, the task yields once.
/// The server then sees the reset and drops the request before anything is claimed.
#[derive(Debug)]
pub(crate) struct Checked<B> {
    body: B,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    NotSeen,
    /// The task has yielded once.
    Yielded,
    Confirmed,
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Checked<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        match this.end {
            End::NotSeen => {
                if let Some(frame) = ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                    return Poll::Ready(Some(frame));
                }
                if !this.body.is_end_stream() {
                    this.end = End::Yielded;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
            End::Yielded | End::Confirmed => {}
        }
        this.end = End::Confirmed;
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl RefusalKind {
    /// Returns the refusal of a request whose body was not read to its end.
    pub(crate) fn of_body<B: HttpBody<Data = Bytes> + Unpin>(shortfall: &Shortfall<Checked<B>>) -> Self {
        match shortfall {
            Shortfall::Broken(_) | Shortfall::Short(_) => Self::BodyBroken,
            Shortfall::TooLarge(_) => Self::BodyTooLarge,
            Shortfall::TooSlow(_) => Self::BodyTimeout,
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    #[test]
    fn a_checked_body_declares_the_length_and_the_end_of_its_request() {
        for (bytes, is_end) in [("abc", false), ("", true)] {
            let body = Checked {
                body: Full::<Bytes>::from(bytes),
                end: End::NotSeen,
            };
            assert_eq!(body.size_hint().exact(), u64::try_from(bytes.len()).ok());
            assert_eq!(body.is_end_stream(), is_end);
        }
    }
}
