//! Leases of messages, and of calls that are made once, are renewed by the same tasks as leases of requests.

use std::future::ready;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use futures::future::join_all;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{sleep, timeout};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::OnError;
use tower_idempotency::receiver::{Receipt, ReceiveError, ReceiverLayer};

use crate::support::{Fault, RemoteStore};

const LEASE: Duration = Duration::from_secs(1);
const SECOND: Duration = Duration::from_secs(1);

type Received = Result<Receipt<()>, ReceiveError<&'static str>>;

fn layer(store: &RemoteStore) -> ReceiverLayer<RemoteStore, &'static str> {
    let layer = ReceiverLayer::new(store.clone(), "billing").with_id(|message: &&str| *message);
    layer.with_lease(LEASE).at_least_once()
}

fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Receives a message with a handler that ends after some time.
fn receive<H, F>(
    layer: &ReceiverLayer<RemoteStore, &'static str>,
    message: &'static str,
    handler: H,
) -> impl Future<Output = Received> + use<H, F>
where
    H: Fn() -> F + Clone + Send + 'static,
    F: Future<Output = Result<(), &'static str>> + Send + 'static,
{
    layer.layer(service_fn(move |_| handler())).oneshot(message)
}

/// Delivers a message in another process, with a handler that succeeds at once. This delivery takes the message over
/// if its lease has ended.
fn elsewhere(store: &RemoteStore, message: &'static str) -> impl Future<Output = Received> + use<> {
    receive(&layer(store), message, || ready(Ok(())))
}

/// Each attempt had a task of its own.
#[tokio::test(start_paused = true)]
async fn one_task_renews_the_leases_of_all_messages_and_ends_with_the_last_one() {
    let store = RemoteStore::new();
    let layer = layer(&store).with_lease(3 * SECOND);
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let messages = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let handler = || async {
        sleep(10 * SECOND).await;
        Ok(())
    };
    let mut deliveries = pin!(join_all(messages.map(|message| receive(&layer, message, handler))));
    assert!(timeout(SECOND / 10, &mut deliveries).await.is_err());
    assert_eq!(tasks(), 1);
    assert!(deliveries.await.iter().all(Result::is_ok));
    let renewals = store.calls("renew") / messages.len();
    assert!((9..=10).contains(&renewals), "{renewals} for each message");
    sleep(SECOND).await;
    assert_eq!(tasks(), 0);
}

/// The handler blocks the runtime of its delivery. The task of another runtime finds the renewal overdue.
#[test]
fn a_message_whose_runtime_is_blocked_is_renewed_by_another_runtime() {
    let store = RemoteStore::new();
    let layer = layer(&store);
    let blocking = receive(&layer, "m", || async {
        thread::sleep(3 * LEASE);
        Ok(())
    });
    let waiting = receive(&layer, "beside", || async {
        sleep(3 * LEASE).await;
        Ok(())
    });
    let beside = thread::spawn(move || one_thread().block_on(waiting).is_ok());
    let owner = thread::spawn(move || one_thread().block_on(blocking).is_ok());
    thread::sleep(2 * LEASE);
    let duplicate = one_thread().block_on(elsewhere(&store, "m"));
    assert!(matches!(duplicate, Ok(Receipt::InFlight { .. })), "{duplicate:?}");
    assert!(owner.join().unwrap() && beside.join().unwrap());
}

#[test]
fn a_message_is_renewed_after_the_runtime_of_an_earlier_one_has_ended() {
    let store = RemoteStore::new();
    let layer = layer(&store);
    one_thread().block_on(async {
        let endless = receive(&layer, "first", std::future::pending);
        assert!(timeout(LEASE / 2, endless).await.is_err());
    });
    one_thread().block_on(async {
        let handler = || async {
            sleep(3 * LEASE).await;
            Ok(())
        };
        let owner = tokio::spawn(receive(&layer, "m", handler));
        sleep(2 * LEASE).await;
        let duplicate = elsewhere(&store, "m").await;
        assert!(matches!(duplicate, Ok(Receipt::InFlight { .. })), "{duplicate:?}");
        assert!(owner.await.unwrap().is_ok());
    });
}

/// A delivery is polled on one runtime, which then ends, and goes on on another one.
#[test]
fn the_lease_of_a_message_moves_with_its_delivery_to_another_runtime() {
    let store = RemoteStore::new();
    store.set_yields(0);
    let layer = layer(&store);
    // The handler needs no timer of the runtime that has ended.
    let (end, ended) = tokio::sync::watch::channel(());
    let mut delivery = Box::pin(receive(&layer, "m", move || {
        let mut ended = ended.clone();
        async move {
            assert!(ended.changed().await.is_ok());
            Ok(())
        }
    }));
    one_thread().block_on(async { assert!(futures::poll!(&mut delivery).is_pending()) });
    one_thread().block_on(async {
        let owner = tokio::spawn(delivery);
        sleep(2 * LEASE).await;
        let duplicate = elsewhere(&store, "m").await;
        assert!(matches!(duplicate, Ok(Receipt::InFlight { .. })), "{duplicate:?}");
        end.send(()).unwrap();
        assert!(owner.await.unwrap().is_ok());
    });
}

/// A renewal is under way when the handler fails, and reaches the store first or last.
#[tokio::test(start_paused = true)]
async fn a_renewal_that_is_under_way_does_not_hold_a_message_whose_handler_failed() {
    for on_error in [OnError::Release, OnError::Unknown] {
        let store = RemoteStore::new();
        let layer = layer(&store).with_lease(30 * SECOND).on_error(on_error);
        // The renewal begins shortly before 10 s, and ends 3 s later. The release or the end of the lease hangs from 11 s
        // to 16 s.
        store.fail("renew", [Fault::Slow(3), Fault::Hang]);
        store.fail("release", [Fault::Hang]);
        let failing = tokio::spawn(receive(&layer, "m", || async {
            sleep(11 * SECOND).await;
            Err("refused")
        }));
        sleep(14 * SECOND).await;
        let again = elsewhere(&store, "m").await;
        assert!(matches!(again, Ok(Receipt::First(()))), "{on_error:?}: {again:?}");
        drop(failing.await.unwrap());
    }
}

/// A renewal that panicked used up its turn. After two of them, the lease was lost.
#[tokio::test(start_paused = true)]
async fn a_renewal_that_panics_is_repeated_before_the_lease_ends() {
    let store = RemoteStore::new();
    let layer = layer(&store).with_lease(30 * SECOND);
    store.fail("renew", [Fault::Panic; 3]);
    let owner = tokio::spawn(receive(&layer, "m", || async {
        sleep(60 * SECOND).await;
        Ok(())
    }));
    sleep(35 * SECOND).await;
    let duplicate = elsewhere(&store, "m").await;
    assert!(matches!(duplicate, Ok(Receipt::InFlight { .. })), "{duplicate:?}");
    assert!(matches!(owner.await.unwrap(), Ok(Receipt::First(()))));
}

/// The store starts the lease when it grants the key, not when its reply arrives.
#[tokio::test(start_paused = true)]
async fn a_message_whose_grant_arrives_late_is_renewed_in_time() {
    let store = RemoteStore::new();
    let layer = layer(&store).with_lease(12 * SECOND).with_store_timeout(12 * SECOND);
    store.fail("claim", [Fault::SlowReply(9)]);
    let owner = tokio::spawn(receive(&layer, "m", || async {
        sleep(24 * SECOND).await;
        Ok(())
    }));
    // A third of the lease after the reply would be at 13 s.
    sleep(12 * SECOND + SECOND / 2).await;
    let duplicate = elsewhere(&store, "m").await;
    assert!(matches!(duplicate, Ok(Receipt::InFlight { .. })), "{duplicate:?}");
    assert!(matches!(owner.await.unwrap(), Ok(Receipt::First(()))));
}

#[cfg(feature = "once")]
mod calls {
    use tokio::sync::oneshot;
    use tower_idempotency::client::{Failure, once};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_notices_that_another_one_has_taken_its_key_over() {
        let store = RemoteStore::new();
        store.fail("renew", [Fault::Before; 1_000]);
        let call = || once(store.clone(), "k").at_least_once().with_lease(LEASE);
        let lost = tokio::spawn(call().run(|attempt| async move {
            while attempt.is_held() {
                sleep(SECOND / 10).await;
            }
            Ok::<_, Failure<&str>>(1)
        }));
        sleep(2 * LEASE).await;
        let winner = call().run(|_| ready(Ok::<_, Failure<&str>>(2))).await;
        assert_eq!(winner.unwrap().into_value(), 2);
        store.heal();
        let lost = timeout(LEASE, lost).await.unwrap();
        assert_eq!(lost.unwrap().unwrap().into_value(), 2);
    }

    /// As for a message above.
    #[tokio::test(start_paused = true)]
    async fn a_call_whose_grant_arrives_late_is_renewed_in_time() {
        let store = RemoteStore::new();
        store.fail("claim", [Fault::SlowReply(9)]);
        let call = || once(store.clone(), "k").at_least_once().with_lease(12 * SECOND);
        let owner = call().with_store_timeout(12 * SECOND).run(|_| async {
            sleep(24 * SECOND).await;
            Ok::<_, Failure<&str>>(1)
        });
        let owner = tokio::spawn(owner);
        sleep(12 * SECOND + SECOND / 2).await;
        let other = call()
            .with_wait(60 * SECOND)
            .run(|_| ready(Ok::<_, Failure<&str>>(2)))
            .await;
        assert_eq!(other.unwrap().into_value(), 1);
        assert_eq!(owner.await.unwrap().unwrap().into_value(), 1);
    }

    /// The renewal finds the record completed, by its own attempt.
    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_outlasts_its_call_does_not_make_the_attempt_lost() {
        let store = RemoteStore::new();
        store.fail("renew", [Fault::Slow(3)]);
        let (send, attempt) = oneshot::channel();
        let call = once(store.clone(), "k").run(|attempt| async move {
            sleep(11 * SECOND).await;
            assert!(send.send(attempt).is_ok());
            Ok::<_, Failure<&str>>(1)
        });
        assert_eq!(call.await.unwrap().into_value(), 1);
        sleep(5 * SECOND).await;
        assert_eq!(store.calls("renew"), 1);
        assert!(attempt.await.unwrap().is_held());
    }
}
