//! Notifications with the contract of tokio's, on shuttle's lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;

use crate::Mutex;

use self::futures::{Notified, NotifiedBy, OwnedNotified};

/// Wakes tasks that wait for a change.
#[derive(Debug, Default)]
pub struct Notify(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The number of calls of `notify_waiters`.
    calls: u64,
    /// Whether `notify_one` found no waiter, so that the next one does not wait.
    has_permit: bool,
    next: u64,
    /// The enabled waiters in their order, and the wakers of those that were polled.
    waiters: BTreeMap<u64, Option<Waker>>,
}

impl Notify {
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes all waiters that exist, also those that are not enabled.
    pub fn notify_waiters(&self) {
        let mut state = self.0.lock().unwrap();
        state.calls += 1;
        let woken = std::mem::take(&mut state.waiters);
        drop(state);
        woken.into_values().flatten().for_each(Waker::wake);
    }

    /// Wakes the first enabled waiter. If there is none, the next waiter does not wait.
    pub fn notify_one(&self) {
        let mut state = self.0.lock().unwrap();
        let first = state.waiters.pop_first();
        state.has_permit |= first.is_none();
        drop(state);
        if let Some((_, Some(waker))) = first {
            waker.wake();
        }
    }

    pub fn notified(&self) -> Notified<'_> {
        NotifiedBy::new(self)
    }

    pub fn notified_owned(self: Arc<Self>) -> OwnedNotified {
        NotifiedBy::new(self)
    }
}

/// The futures of a notification.
pub mod futures {
    use std::ops::Deref;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Waker};

    use super::Notify;

    pub type Notified<'n> = NotifiedBy<&'n Notify>;
    pub type OwnedNotified = NotifiedBy<Arc<Notify>>;

    /// Resolves at the next notification.
    #[derive(Debug)]
    pub struct NotifiedBy<N: Deref<Target = Notify>> {
        notify: N,
        /// The number of calls of `notify_waiters` before this value was made.
        calls: u64,
        progress: Progress,
    }

    #[derive(Clone, Copy, Debug)]
    enum Progress {
        New,
        /// The number among the waiters.
        Enabled(u64),
        Notified,
    }

    impl<N: Deref<Target = Notify> + Unpin> NotifiedBy<N> {
        pub(super) fn new(notify: N) -> Self {
            let calls = notify.0.lock().unwrap().calls;
            let progress = Progress::New;
            Self {
                notify,
                calls,
                progress,
            }
        }

        /// Enters this waiter, and returns whether it was notified already.
        pub fn enable(self: Pin<&mut Self>) -> bool {
            self.get_mut().is_notified(None)
        }

        fn is_notified(&mut self, waker: Option<Waker>) -> bool {
            let mut state = self.notify.0.lock().unwrap();
            let number = match self.progress {
                Progress::Notified => return true,
                _ if state.calls != self.calls => {
                    self.progress = Progress::Notified;
                    return true;
                }
                Progress::Enabled(number) if !state.waiters.contains_key(&number) => {
                    self.progress = Progress::Notified;
                    return true;
                }
                Progress::Enabled(number) => number,
                Progress::New if std::mem::take(&mut state.has_permit) => {
                    self.progress = Progress::Notified;
                    return true;
                }
                Progress::New => {
                    state.next += 1;
                    state.next
                }
            };
            self.progress = Progress::Enabled(number);
            state.waiters.insert(number, waker);
            false
        }
    }

    impl<N: Deref<Target = Notify> + Unpin> Future for NotifiedBy<N> {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            match self.get_mut().is_notified(Some(cx.waker().clone())) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        }
    }

    impl<N: Deref<Target = Notify>> Drop for NotifiedBy<N> {
        fn drop(&mut self) {
            let Progress::Enabled(number) = self.progress else {
                return;
            };
            // After a panic, locks may still be held, so do not lock here.
            if std::thread::panicking() {
                return;
            }
            let mut state = self.notify.0.lock().unwrap();
            let is_taken = state.waiters.remove(&number).is_none();
            let passes_on = is_taken && state.calls == self.calls;
            drop(state);
            // If `notify_one` woke a waiter that was dropped before it saw the notification, wake the next.
            if passes_on {
                self.notify.notify_one();
            }
        }
    }
}
