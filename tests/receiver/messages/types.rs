//! Messages of several types under one id.

use super::*;

#[derive(Clone)]
enum OrderEvent {
    Placed { id: u64, lines: Vec<u8> },
    Cancelled { id: u64 },
}

impl OrderEvent {
    fn id(&self) -> u64 {
        match self {
            Self::Placed { id, .. } | Self::Cancelled { id } => *id,
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Placed { .. } => "order-placed",
            Self::Cancelled { .. } => "order-cancelled",
        }
    }

    fn lines(&self) -> &[u8] {
        match self {
            Self::Placed { lines, .. } => lines,
            Self::Cancelled { .. } => &[],
        }
    }
}

fn placed() -> OrderEvent {
    OrderEvent::Placed { id: 1, lines: vec![7] }
}

const CANCELLED: OrderEvent = OrderEvent::Cancelled { id: 1 };

type Layered = ReceiverLayer<RemoteStore, OrderEvent>;

fn events(store: &RemoteStore) -> Layered {
    ReceiverLayer::new(store.clone(), "billing").with_id(OrderEvent::id)
}

async fn receive(layer: &Layered, event: OrderEvent) -> Result<Receipt<()>, ReceiveError<String>> {
    let handler = tower::service_fn(|_: OrderEvent| async { Ok::<_, String>(()) });
    layer.layer(handler).oneshot(event).await
}

#[tokio::test(start_paused = true)]
async fn a_message_of_another_type_is_not_acknowledged_as_a_duplicate() {
    for on_mismatch in [OnMismatch::Duplicate, OnMismatch::Error] {
        let store = RemoteStore::new();
        let by_type = events(&store).with_type(OrderEvent::name).on_mismatch(on_mismatch);
        for layer in [by_type.clone(), by_type.with_payload(OrderEvent::lines)] {
            let layer = layer.with_namespace(format!("{:?}", store.len()));
            assert!(matches!(receive(&layer, placed()).await, Ok(Receipt::First(()))));
            assert!(matches!(receive(&layer, placed()).await, Ok(Receipt::Duplicate)));
            let cancelled = receive(&layer, CANCELLED).await;
            assert!(matches!(cancelled, Err(ReceiveError::TypeMismatch)), "{cancelled:?}");
            assert_eq!(Disposition::of(&cancelled), Disposition::Reject);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_type_that_is_a_part_of_the_id_makes_two_messages() {
    let layer = events(&RemoteStore::new())
        .with_type(OrderEvent::name)
        .with_id(|event| MessageId::of([event.name(), &event.id().to_string()]));
    for event in [placed(), CANCELLED] {
        assert!(matches!(receive(&layer, event.clone()).await, Ok(Receipt::First(()))));
        assert!(matches!(receive(&layer, event).await, Ok(Receipt::Duplicate)));
    }
}

/// The record has only the parts that were compared when it was made.
#[tokio::test(start_paused = true)]
async fn newly_compared_types_make_no_handled_message_a_mismatch() {
    let store = RemoteStore::new();
    let bare = events(&store);
    let with_payload = bare.clone().with_payload(OrderEvent::lines);
    let with_type = bare.clone().with_type(OrderEvent::name);
    let with_both = with_type.clone().with_payload(OrderEvent::lines);
    let all = [bare, with_payload, with_type, with_both];
    for (place, before) in all.iter().enumerate() {
        for after in &all {
            let namespace = format!("{}", store.len());
            let [before, after] = [before, after].map(|layer| layer.clone().with_namespace(namespace.clone()));
            assert!(
                matches!(receive(&before, placed()).await, Ok(Receipt::First(()))),
                "{place}"
            );
            let again = receive(&after, placed()).await;
            assert!(matches!(again, Ok(Receipt::Duplicate)), "{place}: {again:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_payload_is_compared_with_a_record_that_has_no_type() {
    let store = RemoteStore::new();
    let before = events(&store).with_payload(OrderEvent::lines);
    assert!(matches!(receive(&before, placed()).await, Ok(Receipt::First(()))));
    let after = before.with_type(OrderEvent::name);
    let other = OrderEvent::Placed { id: 1, lines: vec![8] };
    assert!(matches!(receive(&after, other).await, Err(ReceiveError::Mismatch)));
}
