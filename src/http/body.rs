//! Reads bodies within bounds, and rebuilds bodies from the bytes that were read.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Extensions, HeaderMap};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{BodyExt, Full};

use super::first_message::FirstMessage;
use crate::clock::Limit;

/// A body type that can be rebuilt from bytes that were read from it.
///
/// The layer does not change the types of your bodies. A request that it does not guard passes
/// through untouched and unboxed. The layer reads the body of a request that it guards, and uses
/// this trait to turn the bytes back into a body. The trait is implemented for `axum::body::Body`
/// (feature `axum`), for `tonic::body::Body` (feature `tonic`), for `reqwest::Body` (feature
/// `reqwest`), for the boxed bodies and `Full` of `http-body-util`, and for [`BufferedBody`], which
/// wraps any other body.
#[diagnostic::on_unimplemented(
    message = "the idempotency layer reads `{Self}` and cannot rebuild it",
    label = "not a body that can be rebuilt from bytes",
    note = "in an axum app, enable the feature `axum` of `tower-idempotency`",
    note = "around a tonic service, enable the feature `tonic` of `tower-idempotency`",
    note = "otherwise wrap the body with `tower_idempotency::BufferedBody::new`: the body of a request with \
            `tower_http::map_request_body::MapRequestBodyLayer` outside of this layer, the body of a response with \
            `tower_http::map_response_body::MapResponseBodyLayer` inside of this layer",
    note = "or box the body at the same place with `http_body_util::BodyExt::boxed_unsync`"
)]
pub trait RebuildBody: HttpBody<Data = Bytes> + Unpin + Sized {
    /// Returns a body that yields the same frames as `body`.
    fn rebuild(body: BufferedBody<Self>) -> Self;
}

/// A body whose front was read: the bytes that were read, then the rest of `B`, then trailers.
///
/// Use [`BufferedBody::new`] to wrap a body that is no [`RebuildBody`], such as
/// `hyper::body::Incoming`.
pub struct BufferedBody<B> {
    front: Bytes,
    rest: Option<B>,
    /// The maximum number of bytes that `rest` can still yield, from its size hint before it was
    /// read. `None` if `rest` was not read, or if its hint had no upper bound. Some bodies return
    /// their first hint until they end.
    left: Option<u64>,
    trailers: Option<HeaderMap>,
}

impl<B> BufferedBody<B> {
    /// Returns a body that was not read yet.
    pub const fn new(body: B) -> Self {
        Self {
            front: Bytes::new(),
            rest: Some(body),
            left: None,
            trailers: None,
        }
    }

    /// Calls `of_bytes` if this body has nothing but its front, and `of_body` otherwise.
    #[cfg(any(feature = "axum", feature = "reqwest"))]
    fn fold<T>(self, of_bytes: impl FnOnce(Bytes) -> T, of_body: impl FnOnce(Self) -> T) -> T {
        match self {
            Self {
                front,
                rest: None,
                trailers: None,
                ..
            } => of_bytes(front),
            body => of_body(body),
        }
    }

    /// Returns a body that consists of these bytes.
    pub const fn from_bytes(bytes: Bytes) -> Self {
        Self {
            front: bytes,
            rest: None,
            left: None,
            trailers: None,
        }
    }

    /// Clones this body if `clone` can clone its unread rest.
    #[cfg(feature = "retry")]
    pub(crate) fn try_clone_with(&self, clone: impl FnOnce(&B) -> Option<B>) -> Option<Self> {
        let rest = match &self.rest {
            Some(rest) => Some(clone(rest)?),
            None => None,
        };
        Some(Self {
            front: self.front.clone(),
            rest,
            left: self.left,
            trailers: self.trailers.clone(),
        })
    }
}

impl<B> fmt::Debug for BufferedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferedBody({} bytes read", self.front.len())?;
        f.write_str(if self.rest.is_some() { ", more to come)" } else { ")" })
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for BufferedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if !self.front.is_empty() {
            let front = std::mem::take(&mut self.front);
            return Poll::Ready(Some(Ok(Frame::data(front))));
        }
        let this = &mut *self;
        if let Some(rest) = &mut this.rest {
            if let Some(frame) = ready!(Pin::new(&mut *rest).poll_frame(cx)) {
                if let (Some(left), Ok(frame)) = (&mut this.left, &frame) {
                    *left = left.saturating_sub(frame.data_ref().map_or(0, |data| length(data.len())));
                }
                return Poll::Ready(Some(frame));
            }
            // Keep a body that does not confirm its end, so that this body does not confirm its end
            // either.
            if rest.is_end_stream() || this.trailers.is_some() {
                this.rest = None;
            }
        }
        Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.front.is_empty() && self.trailers.is_none() && self.rest.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let front = length(self.front.len());
        let rest = self
            .rest
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint);
        let left = self.left.unwrap_or(u64::MAX);
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().min(left).saturating_add(front));
        // A known length would be sent as `Content-Length`. HTTP/1.1 then has no place for trailers
        // (RFC 9112 section 7.1.2).
        if let (Some(upper), None) = (rest.upper(), &self.trailers) {
            hint.set_upper(upper.min(left).saturating_add(front));
        }
        hint
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> RebuildBody for BufferedBody<B> {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        let BufferedBody {
            front, rest, trailers, ..
        } = body;
        match rest {
            None => Self {
                front,
                rest: None,
                left: None,
                trailers,
            },
            Some(inner) => Self {
                front: joined(front, inner.front),
                rest: inner.rest,
                left: inner.left,
                trailers: trailers.or(inner.trailers),
            },
        }
    }
}

fn joined(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (true, _) => second,
        (_, true) => first,
        _ => [first, second].concat().into(),
    }
}

impl RebuildBody for Full<Bytes> {
    /// A `Full` has no trailers and yields all its bytes at once. Therefore either nothing of it
    /// was read, or all.
    fn rebuild(body: BufferedBody<Self>) -> Self {
        match body.rest {
            Some(unread) if body.front.is_empty() => unread,
            _ => Self::new(body.front),
        }
    }
}

impl<E: 'static> RebuildBody for UnsyncBoxBody<Bytes, E> {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        body.boxed_unsync()
    }
}

impl<E: 'static> RebuildBody for BoxBody<Bytes, E> {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        body.boxed()
    }
}

#[cfg(feature = "axum")]
impl RebuildBody for axum::body::Body {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        body.fold(Self::from, Self::new)
    }
}

#[cfg(feature = "reqwest")]
impl RebuildBody for reqwest::Body {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        body.fold(Self::from, Self::wrap)
    }
}

#[cfg(feature = "tonic")]
impl RebuildBody for tonic::body::Body {
    fn rebuild(body: BufferedBody<Self>) -> Self {
        match body.rest {
            Some(unread) if body.front.is_empty() && body.trailers.is_none() => unread,
            rest => Self::new(BufferedBody { rest, ..body }),
        }
    }
}

/// A body that was read to its end.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) bytes: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Collected {
    /// Returns a body that yields the same bytes and trailers.
    pub(crate) fn rebuild<B: RebuildBody>(self) -> B {
        B::rebuild(BufferedBody {
            front: self.bytes,
            rest: None,
            left: None,
            trailers: self.trailers,
        })
    }
}

/// The reason why a body was not read to its end.
#[derive(Debug)]
pub(crate) enum Shortfall<B: HttpBody> {
    /// The body failed with an error.
    Broken(B::Error),
    /// The body ended without an error, although its size hint still promised bytes. hyper ends an
    /// HTTP/2 body in this way if the peer resets the stream with `NO_ERROR`. The value is the part
    /// that was read.
    Short(Collected),
    /// The body is longer than the limit. The value yields the whole body, including the part that
    /// was read.
    TooLarge(BufferedBody<B>),
    /// The body took longer than the limit. The value yields the whole body, including the part
    /// that was read.
    TooSlow(BufferedBody<B>),
}

/// The largest number of frames that one poll reads. Without a bound, an endless body that is
/// always ready would never return from the poll, and no timer could end it.
const FRAMES_PER_POLL: usize = 128;

/// The longest body in bytes, and the longest time in which it may arrive.
///
/// `WebhookLayer` puts its bounds into the request's extensions. An `IdempotencyLayer` inside uses
/// them in place of its own, so that one setting governs both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyBounds {
    pub(crate) bytes: usize,
    pub(crate) timeout: Duration,
}

impl BodyBounds {
    /// Returns the bounds of an outer layer, or these bounds if no outer layer has read the body.
    pub(crate) fn of_outer_or_self(self, extensions: &Extensions) -> Self {
        extensions.get().copied().unwrap_or(self)
    }
}

/// Reads a body to its end. Stops at the frame that exceeds `limit` bytes, or after `timeout`.
/// Creates no timer if the body is complete at the first poll.
pub(crate) fn collect<B: HttpBody<Data = Bytes> + Unpin>(body: B, limit: usize, timeout: Duration) -> Collect<B> {
    Collect {
        declared: body.size_hint(),
        body: Some(body),
        limit,
        timeout: Limit::Set(timeout),
        first_message: None,
        read: Read::default(),
        trailers: None,
    }
}

/// The time within which a gRPC response must end after its first message. A server sends the
/// status of a unary call together with its message. A response that goes on for longer is a
/// stream, and its caller must not wait for its end.
const AFTER_FIRST_MESSAGE: Duration = Duration::from_millis(100);

/// Reads a gRPC body to its end, as [`collect`] does. Stops 100 ms after the first message at the
/// latest.
pub(crate) fn collect_messages<B: HttpBody<Data = Bytes> + Unpin>(
    body: B,
    limit: usize,
    timeout: Duration,
) -> Collect<B> {
    Collect {
        first_message: Some(FirstMessage::default()),
        ..collect(body, limit, timeout)
    }
}

/// The future of [`collect`].
#[derive(Debug)]
pub(crate) struct Collect<B> {
    /// `None` once the body has ended.
    body: Option<B>,
    /// The first size hint of the body.
    declared: SizeHint,
    limit: usize,
    timeout: Limit,
    /// Detects the end of the first message. `None` once that end was seen.
    first_message: Option<FirstMessage>,
    read: Read,
    trailers: Option<HeaderMap>,
}

/// The way in which the reading of a body ended.
enum Stop<E> {
    Broken(E),
    Ended,
    TooLarge,
    TooSlow,
}

impl<B: HttpBody<Data = Bytes> + Unpin> Collect<B> {
    fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<Stop<B::Error>> {
        let Some(body) = &mut self.body else {
            return Poll::Pending;
        };
        if self.read.len() == 0 && exceeds(body.size_hint().lower(), self.limit) {
            return Poll::Ready(Stop::TooLarge);
        }
        for _ in 0..FRAMES_PER_POLL {
            let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)) else {
                return Poll::Ready(Stop::Ended);
            };
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => {
                    if self.first_message.as_mut().is_some_and(|first| first.ends_with(&data)) {
                        self.first_message = None;
                        self.timeout.shorten(AFTER_FIRST_MESSAGE);
                    }
                    self.read.push(data, self.limit);
                }
                Ok(Err(frame)) => self.trailers = frame.into_trailers().ok(),
                Err(error) => return Poll::Ready(Stop::Broken(error)),
            }
            if self.read.len() > self.limit {
                return Poll::Ready(Stop::TooLarge);
            }
            if body.is_end_stream() {
                return Poll::Ready(Stop::Ended);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> Future for Collect<B> {
    type Output = Result<Collected, Shortfall<B>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let stop = match this.poll_frames(cx) {
            Poll::Ready(stop) => stop,
            Poll::Pending if this.body.is_none() => return Poll::Pending,
            Poll::Pending => {
                ready!(this.timeout.poll_over(cx));
                Stop::TooSlow
            }
        };
        let front = std::mem::take(&mut this.read).into_bytes();
        let read = length(front.len());
        let left = this.declared.upper().map(|upper| upper.saturating_sub(read));
        let (rest, trailers) = (this.body.take(), this.trailers.take());
        Poll::Ready(match stop {
            Stop::Broken(error) => Err(Shortfall::Broken(error)),
            Stop::Ended => {
                let part = Collected { bytes: front, trailers };
                // Some bodies return their first hint until they end, so the hint alone does not
                // show that bytes are missing.
                if read < this.declared.lower() && rest.is_some_and(|body| body.size_hint().lower() > 0) {
                    Err(Shortfall::Short(part))
                } else {
                    Ok(part)
                }
            }
            Stop::TooLarge => Err(Shortfall::TooLarge(BufferedBody {
                front,
                rest,
                left,
                trailers,
            })),
            Stop::TooSlow => Err(Shortfall::TooSlow(BufferedBody {
                front,
                rest,
                left,
                trailers,
            })),
        })
    }
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn exceeds(len: u64, limit: usize) -> bool {
    usize::try_from(len).map_or(true, |len| len > limit)
}

/// The bytes that were read. A single frame is stored as it came. Several frames are copied into
/// one buffer, so that a body of many small frames does not hold many buffers.
#[derive(Debug, Default)]
struct Read {
    only: Bytes,
    joined: BytesMut,
}

impl Read {
    fn len(&self) -> usize {
        self.only.len() + self.joined.len()
    }

    fn push(&mut self, data: Bytes, limit: usize) {
        if self.len() == 0 {
            self.only = data;
            return;
        }
        if self.joined.is_empty() {
            let room = (self.only.len() + data.len())
                .saturating_mul(2)
                .min(limit.max(self.only.len() + data.len()));
            self.joined.reserve(room);
            self.joined.extend_from_slice(&std::mem::take(&mut self.only));
        }
        self.joined.extend_from_slice(&data);
    }

    fn into_bytes(self) -> Bytes {
        if self.joined.is_empty() {
            self.only
        } else {
            self.joined.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::FutureExt;
    use futures::executor::block_on;
    use futures::stream::{self, StreamExt};
    use http_body_util::StreamBody;

    use super::*;
    use crate::clock::pass;

    type Frames = UnsyncBoxBody<Bytes, Infallible>;

    fn frames(data: &[&'static str], trailer: Option<&'static str>) -> Frames {
        let mut frames: Vec<_> = data
            .iter()
            .map(|data| Ok(Frame::data(Bytes::from_static(data.as_bytes()))))
            .collect();
        if let Some(value) = trailer {
            let trailers = HeaderMap::from_iter([(http::header::ETAG, value.parse().unwrap())]);
            frames.push(Ok(Frame::trailers(trailers)));
        }
        StreamBody::new(stream::iter(frames)).boxed_unsync()
    }

    /// Works without a runtime, so a timer would panic.
    fn reading<B: RebuildBody>(body: B, limit: usize) -> Collect<B> {
        collect(body, limit, Duration::from_secs(10))
    }

    fn drain<B: HttpBody<Data = Bytes, Error = Infallible> + Unpin>(body: B) -> (Bytes, Option<HeaderMap>) {
        let collected = block_on(body.collect()).unwrap();
        let trailers = collected.trailers().cloned();
        (collected.to_bytes(), trailers)
    }

    #[test]
    fn frames_and_trailers_come_back() {
        let read = block_on(reading(frames(&["ab", "", "cd"], Some("t")), 4)).unwrap();
        let (bytes, trailers) = drain(read.rebuild::<Frames>());
        assert_eq!(bytes, "abcd");
        assert_eq!(trailers.unwrap()[http::header::ETAG], "t");
    }

    #[test]
    fn a_body_over_the_limit_is_handed_back_whole() {
        let Err(Shortfall::TooLarge(body)) = block_on(reading(frames(&["ab", "cd", "ef"], Some("t")), 3)) else {
            panic!("it fits")
        };
        let (bytes, trailers) = drain(Frames::rebuild(body));
        assert_eq!(bytes, "abcdef");
        assert!(trailers.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_is_handed_back_whole_when_its_time_is_over() {
        let stalled = stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"ab")))]).chain(
            stream::once(tokio::time::sleep(Duration::from_secs(11)))
                .map(|()| Ok(Frame::data(Bytes::from_static(b"cd")))),
        );
        let body: Frames = StreamBody::new(stalled).boxed_unsync();
        let Err(Shortfall::TooSlow(body)) = collect(body, 4, Duration::from_secs(10)).await else {
            panic!("it was waited for")
        };
        assert_eq!(Frames::rebuild(body).collect().await.unwrap().to_bytes(), "abcd");
    }

    /// Once, the task never returned from its poll, so no timer could end it.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_always_ready_ends_when_its_time_is_over() {
        let empty = stream::repeat_with(|| Ok::<_, Infallible>(Frame::data(Bytes::new())));
        let body: Frames = StreamBody::new(empty).boxed_unsync();
        let reading = tokio::spawn(collect(body, 4, Duration::from_secs(10)));
        pass(Duration::ZERO).await;
        pass(Duration::from_secs(9)).await;
        assert!(!reading.is_finished());
        pass(Duration::from_secs(1)).await;
        assert!(reading.is_finished());
        assert!(matches!(reading.await.unwrap(), Err(Shortfall::TooSlow(_))));
    }

    #[test]
    fn many_frames_are_read_without_a_runtime() {
        let many = vec!["x"; 3 * FRAMES_PER_POLL];
        let all = block_on(reading(frames(&many, None), many.len())).unwrap();
        assert_eq!(all.bytes.len(), many.len());
    }

    #[test]
    fn a_single_frame_is_not_copied() {
        let frame = Bytes::from(vec![7; 1000]);
        let read = block_on(reading(Full::new(frame.clone()), 1000)).unwrap();
        assert_eq!(read.bytes.as_ptr(), frame.as_ptr());
        let Err(Shortfall::TooLarge(body)) = block_on(reading(Full::new(frame), 999)) else {
            panic!()
        };
        assert_eq!(body.size_hint().exact(), Some(1000));
    }

    /// A body whose size hint does not fall while it is read.
    #[derive(Debug)]
    struct FixedHint(Frames, SizeHint);

    impl HttpBody for FixedHint {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Pin::new(&mut self.0).poll_frame(cx)
        }

        fn size_hint(&self) -> SizeHint {
            self.1
        }
    }

    fn fixed_hint(data: &[&'static str], hint: u64) -> FixedHint {
        FixedHint(frames(data, None), SizeHint::with_exact(hint))
    }

    #[test]
    fn a_body_whose_size_hint_never_falls_is_whole_if_it_has_the_length_of_the_hint() {
        for data in [&["abcd"][..], &["ab", "cd"], &["ab", "", "c", "d"]] {
            let read = block_on(collect(fixed_hint(data, 4), 4, Duration::from_secs(10))).unwrap();
            assert_eq!(read.bytes, "abcd");
            let read = block_on(collect(fixed_hint(data, 5), 5, Duration::from_secs(10)));
            assert!(matches!(read, Err(Shortfall::Short(_))));
        }
    }

    /// A `Content-Length` from such a hint would promise bytes that never come.
    #[test]
    fn the_size_hint_of_a_body_that_was_read_in_part_counts_no_byte_twice() {
        // A body whose hint exceeds the limit is not read at all, so the hint is a range.
        let mut hint = SizeHint::new();
        hint.set_upper(6);
        let body = FixedHint(frames(&["ab", "cd", "ef"], None), hint);
        let Err(Shortfall::TooLarge(mut body)) = block_on(collect(body, 3, Duration::from_secs(10))) else {
            panic!("it fits")
        };
        assert_eq!((body.size_hint().lower(), body.size_hint().upper()), (4, Some(6)));
        let front = block_on(body.frame()).unwrap().unwrap();
        assert_eq!(
            (front.into_data().unwrap(), body.size_hint().upper()),
            (Bytes::from("abcd"), Some(2))
        );
        drop(block_on(body.frame()).unwrap().unwrap());
        assert_eq!(body.size_hint().exact(), Some(0));

        let stalled = stream::iter([Ok(Frame::data(Bytes::from_static(b"ab")))]).chain(stream::pending());
        let body = FixedHint(StreamBody::new(stalled).boxed_unsync(), SizeHint::with_exact(6));
        let mut reading = collect(body, 6, Duration::ZERO);
        let Err(Shortfall::TooSlow(body)) = block_on(&mut reading) else {
            panic!("it has ended")
        };
        assert_eq!(body.size_hint().exact(), Some(6));
    }

    #[test]
    fn a_wrapped_body_is_made_again_without_nesting() {
        let inner = BufferedBody {
            front: Bytes::from_static(b"cd"),
            rest: Some(frames(&["ef"], None)),
            left: None,
            trailers: None,
        };
        let outer = BufferedBody {
            front: Bytes::from_static(b"ab"),
            rest: Some(inner),
            left: None,
            trailers: None,
        };
        assert_eq!(drain(BufferedBody::rebuild(outer)).0, "abcdef");
        let outer = BufferedBody {
            front: Bytes::new(),
            rest: Some(BufferedBody::new(frames(&["x"], None))),
            left: None,
            trailers: Some(HeaderMap::new()),
        };
        assert_eq!(drain(BufferedBody::rebuild(outer)).0, "x");
    }

    #[test]
    fn a_body_that_declares_too_much_is_handed_back_unread() {
        let Err(Shortfall::TooLarge(body)) = block_on(reading(Full::from("abcd"), 3)) else {
            panic!("it fits")
        };
        assert_eq!(format!("{body:?}"), "BufferedBody(0 bytes read, more to come)");
        assert_eq!(drain(Full::rebuild(body)).0, "abcd");
    }

    #[test]
    fn a_body_ends_with_the_last_byte_that_was_read() {
        let body = BufferedBody::<Full<Bytes>>::from_bytes("ab".into());
        assert!(!body.is_end_stream());
        assert_eq!(format!("{body:?}"), "BufferedBody(2 bytes read)");
        assert!(BufferedBody::<Full<Bytes>>::from_bytes(Bytes::new()).is_end_stream());
    }

    #[test]
    fn every_kind_of_body_has_all_its_bytes_after_it_was_read_in_part() {
        fn read<B>(rest: Option<B>) -> BufferedBody<B> {
            BufferedBody {
                front: "ab".into(),
                rest,
                left: None,
                trailers: None,
            }
        }
        assert_eq!(drain(Full::rebuild(read(Some(Full::default())))).0, "ab");
        assert_eq!(drain(Full::rebuild(read(None))).0, "ab");
        let rest = Full::from("cd").boxed();
        assert_eq!(drain(BoxBody::rebuild(read(Some(rest)))).0, "abcd");
    }

    #[cfg(feature = "reqwest")]
    #[test]
    fn a_body_of_reqwest_that_was_read_whole_is_bytes_again() {
        let body = reqwest::Body::rebuild(BufferedBody::from_bytes("ab".into()));
        assert_eq!(body.as_bytes(), Some(&b"ab"[..]));
    }

    #[test]
    fn one_of_two_empty_parts_costs_no_copy() {
        let bytes = Bytes::from_static(b"ab");
        for joined in [joined(Bytes::new(), bytes.clone()), joined(bytes.clone(), Bytes::new())] {
            assert_eq!((joined.as_ptr(), joined.len()), (bytes.as_ptr(), 2));
        }
    }

    #[test]
    fn frames_reserve_at_most_twice_their_bytes_and_never_more_than_the_limit() {
        for (frames, limit, reserved) in [([3, 100], 1_000, 206), ([10, 10], 30, 30), ([10, 10], 15, 20)] {
            let mut read = Read::default();
            for len in frames {
                read.push(vec![0; len].into(), limit);
            }
            assert_eq!(read.joined.capacity(), reserved);
        }
    }

    #[test]
    fn a_body_without_a_declared_end_has_ended_after_its_trailers() {
        let mut body = BufferedBody {
            front: "ab".into(),
            rest: Some(frames(&["cd"], None)),
            left: None,
            trailers: Some(HeaderMap::new()),
        };
        for has_ended in [false, false, true] {
            assert!(block_on(body.frame()).is_some());
            assert_eq!(body.is_end_stream(), has_ended);
        }
    }

    /// The hint of a body that is decompressed may be too high, and falls at its end.
    #[test]
    fn a_body_whose_size_hint_falls_to_zero_is_whole() {
        let reading = Collect {
            declared: SizeHint::with_exact(5),
            ..reading(frames(&["ab"], None), 9)
        };
        assert_eq!(block_on(reading).unwrap().bytes, "ab");
    }

    #[test]
    fn a_body_that_was_read_is_not_read_again() {
        let mut reading = collect(frames(&["ab"], None), 9, Duration::ZERO);
        assert!(block_on(&mut reading).is_ok());
        assert!((&mut reading).now_or_never().is_none());
    }

    #[cfg(feature = "retry")]
    #[test]
    fn a_body_that_was_read_in_part_is_cloned_with_all_its_parts_if_its_rest_can_be() {
        let trailers = HeaderMap::from_iter([(http::header::ETAG, "t".parse().unwrap())]);
        for rest in [None, Some(Full::from("cd"))] {
            for (left, trailers) in [(None, None), (Some(1), None), (None, Some(trailers.clone()))] {
                let body = BufferedBody {
                    front: "ab".into(),
                    rest: rest.clone(),
                    left,
                    trailers,
                };
                let clone = body.try_clone_with(|rest| Some(rest.clone())).unwrap();
                assert_eq!(clone.size_hint().lower(), body.size_hint().lower());
                assert_eq!(clone.size_hint().upper(), body.size_hint().upper());
                assert_eq!(body.try_clone_with(|_| None).is_none(), rest.is_some());
                assert_eq!(drain(clone), drain(body));
            }
        }
    }
}
