//! The test kit for handlers finds the faults that it should find, and handles batches.

use std::collections::HashMap;
use std::future::ready;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::MemoryStore;
use tower_idempotency::protocol::Fence;
use tower_idempotency::receiver::testing::{Report, Scenario, redeliver};
use tower_idempotency::receiver::{Disposition, Receipt, ReceiverLayer, receive_all};
use tower_idempotency::testing::TestLease;

#[derive(Clone, Default)]
struct World(Arc<Mutex<HashMap<usize, usize>>>);

impl World {
    fn take_effect(&self, number: usize) {
        *self.0.lock().unwrap().entry(number).or_default() += 1;
    }

    fn effects(&self, number: usize) -> usize {
        self.0.lock().unwrap().get(&number).copied().unwrap_or(0)
    }

    /// Takes effect between two waits.
    async fn handle(self, number: usize) -> Result<(), String> {
        tokio::task::yield_now().await;
        self.take_effect(number);
        tokio::task::yield_now().await;
        Ok(())
    }
}

fn layer(store: MemoryStore) -> ReceiverLayer<MemoryStore, usize> {
    ReceiverLayer::new(store, "billing").with_id(|number: &usize| *number as u64)
}

async fn behind_receiver(layer: ReceiverLayer<MemoryStore, usize>) -> Report<usize> {
    let world = World::default();
    let handled = world.clone();
    let receiver = layer.layer(service_fn(move |number| handled.clone().handle(number)));
    let deliver = move |number| {
        let receiver = receiver.clone();
        async move { Disposition::of(&receiver.oneshot(number).await) }
    };
    redeliver(|number| number, deliver, |number| ready(world.effects(number))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_handler_differs_in_every_way() {
    let world = World::default();
    let handled = world.clone();
    let deliver = move |number| {
        let handled = handled.clone();
        async move {
            handled.handle(number).await.unwrap();
            Disposition::Acknowledge
        }
    };
    let report = redeliver(|number| number, deliver, |number| ready(world.effects(number))).await;
    assert_eq!(report.once, 1);
    let differ = |scenario| {
        report
            .differences
            .iter()
            .any(|found| found.scenario == scenario && found.observed > 1)
    };
    assert!(differ(Scenario::Twice) && differ(Scenario::TwiceAtOnce), "{report:?}");
    assert!(
        differ(Scenario::Crash { polls: 2 }),
        "between effect and acknowledgement: {report:?}"
    );
    assert!(!differ(Scenario::Crash { polls: 1 }), "before the effect: {report:?}");
    let shown = std::panic::catch_unwind(|| report.assert_same()).unwrap_err();
    assert!(shown.downcast_ref::<String>().unwrap().contains("Twice"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_panics_is_not_taken_for_one_that_has_ended() {
    let panicked = Arc::new(Mutex::new(false));
    let deliver = move |number: usize| {
        let panicked = Arc::clone(&panicked);
        async move {
            // The kit tries the first crash with number 1. The delivery after it does not panic.
            let is_first = number == 1 && !std::mem::replace(&mut *panicked.lock().unwrap(), true);
            if is_first {
                std::panic::resume_unwind(Box::new("the consumer panics"));
            }
            Disposition::Acknowledge
        }
    };
    let tested = tokio::spawn(redeliver(|number| number, deliver, |_| ready(1)));
    assert!(tested.await.unwrap_err().is_panic());
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_receiver_only_the_configured_differences_remain() {
    // At most once: a crash leaves some messages without an effect, and none with two.
    let report = behind_receiver(layer(MemoryStore::new())).await;
    assert!(report.differences.iter().all(|found| found.observed == 0), "{report:?}");
    assert!(
        report
            .differences
            .iter()
            .all(|found| matches!(found.scenario, Scenario::Crash { .. })),
        "{report:?}"
    );
    assert!(!report.rejected.is_empty() && report.scenarios >= 5, "{report:?}");
    // At least once: no message is rejected, and none is without an effect.
    let report = behind_receiver(layer(MemoryStore::new()).at_least_once()).await;
    assert_eq!(report.rejected, []);
    assert!(report.differences.iter().all(|found| found.observed == 2), "{report:?}");
    assert!(!report.differences.is_empty(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_effect_that_deduplicates_by_id_differs_in_no_way() {
    // The world accepts each number once, like a third party that deduplicates by id.
    let world = World::default();
    let handled = world.clone();
    let receiver = layer(MemoryStore::new())
        .at_least_once()
        .layer(service_fn(move |number| {
            let world = handled.clone();
            async move {
                tokio::task::yield_now().await;
                if world.effects(number) == 0 {
                    world.take_effect(number);
                }
                tokio::task::yield_now().await;
                Ok::<_, String>(())
            }
        }));
    let deliver = move |number| {
        let receiver = receiver.clone();
        async move { Disposition::of(&receiver.oneshot(number).await) }
    };
    let report = redeliver(|number| number, deliver, |number| ready(world.effects(number))).await;
    report.assert_same();
    assert!(report.scenarios >= 5 && report.rejected.is_empty(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_reports_which_messages_to_acknowledge() {
    let world = World::default();
    let handled = world.clone();
    let receiver = layer(MemoryStore::new()).layer(service_fn(move |number| {
        let world = handled.clone();
        async move {
            if number % 10 == 3 {
                return Err("no".to_owned());
            }
            world.handle(number).await
        }
    }));
    for at_once in [0, 1, 7, 1_000] {
        let batch = receive_all(&receiver, 0..100, at_once).await;
        assert_eq!(batch.received().len(), 100);
        assert!(batch.failed().eq((0..100).filter(|number| number % 10 == 3)));
        assert_eq!(batch.acknowledged().count(), 90);
    }
    assert!((0..100).all(|number| world.effects(number) == usize::from(number % 10 != 3)));
    // Two copies in one batch.
    let batch = receive_all(&receiver, [200, 201, 200], 3).await.into_received();
    assert!(matches!(batch[0], Ok(Receipt::First(()))));
    assert!(matches!(batch[2], Ok(Receipt::InFlight { .. })), "{batch:?}");
    let batch = receive_all(&receiver, [300, 301, 300], 1).await;
    assert_eq!(batch.acknowledged().count(), 3);
    assert_eq!((world.effects(200), world.effects(300)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_copy_that_is_rejected_is_reported() {
    let deliveries = Arc::new([const { AtomicUsize::new(0) }; 100]);
    let deliver = move |number: usize| {
        let delivery = deliveries[number].fetch_add(1, Ordering::SeqCst);
        ready(match delivery {
            1 => Disposition::Reject,
            _ => Disposition::Acknowledge,
        })
    };
    let report = redeliver(|number| number, deliver, |_| ready(())).await;
    assert!(report.rejected.contains(&Scenario::TwiceAtOnce), "{report:?}");
}

#[test]
fn a_scenario_says_how_the_message_was_delivered() {
    for (scenario, text) in [
        (Scenario::Crash { polls: 3 }, "a crash after 3 polls"),
        (Scenario::Twice, "delivered twice"),
        (Scenario::TwiceAtOnce, "delivered twice at once"),
    ] {
        assert_eq!(scenario.to_string(), text);
    }
}

#[test]
fn a_test_lease_has_the_values_that_the_test_sets() {
    let first = TestLease::new("order-7");
    let later = first.clone().with_attempt(3).with_fence(Fence::new(30));
    // Without a fence of its own, a later attempt has a higher one than the first.
    let second = first.clone().with_attempt(2);
    for (made, attempt, fence) in [(&first, 1, 1), (&second, 2, 2), (&later, 3, 30)] {
        let (server, receiver, client) = (made.for_server(), made.for_receiver(), made.for_client());
        let seen = [server.attempt().number(), receiver.attempt(), client.number()];
        assert_eq!(seen, [attempt; 3]);
        let fences = [server.fence(), receiver.fence(), client.fence()];
        assert_eq!(fences, [Fence::new(fence); 3]);
        assert_eq!(server.key().as_str(), "order-7");
        let shown = format!("{server:?} {receiver:?}");
        assert!(
            shown.starts_with("Lease {") && shown.contains("MessageLease"),
            "{shown}"
        );
        assert!(!shown.contains("order-7"), "{shown}");
        assert!(server.is_held() && receiver.is_held() && client.is_held());
    }
    let lost = later.superseded();
    assert!(!(lost.for_server().is_held() || lost.for_receiver().is_held() || lost.for_client().is_held()));
}

#[test]
fn test_leases_of_one_key_derive_the_same_ids_in_every_attempt() {
    let ids = |made: &TestLease| {
        let (server, receiver, client) = (made.for_server(), made.for_receiver(), made.for_client());
        [
            server.derive_key("a"),
            server.derive_id("a"),
            receiver.id("a"),
            client.id("a"),
        ]
    };
    let first = ids(&TestLease::new("order-7"));
    assert_eq!(first, ids(&TestLease::new("order-7").with_attempt(2)));
    let other = ids(&TestLease::new("order-8"));
    assert!(first.iter().zip(&other).all(|(one, other)| one != other));
}

#[test]
#[should_panic(expected = "not visible ASCII")]
fn a_test_lease_refuses_a_key_that_no_client_could_send() {
    let _ = TestLease::new("no spaces");
}
