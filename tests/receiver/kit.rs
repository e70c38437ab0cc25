//! A message and a layer for the tests of leases, outages and payloads.

use std::future::ready;
use std::time::Duration;

use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::receiver::{MessageLease, Receipt, ReceiveError, ReceiverLayer};

use crate::support::{Fault, RemoteStore};

#[derive(Clone, Default)]
pub(crate) struct Message {
    pub id: String,
    pub payload: String,
    pub lease: Option<MessageLease>,
}

pub(crate) fn message(id: &str, payload: &str) -> Message {
    Message {
        id: id.to_owned(),
        payload: payload.to_owned(),
        lease: None,
    }
}

pub(crate) fn layer<St>(store: St) -> ReceiverLayer<St, Message> {
    ReceiverLayer::new(store, "billing")
        .with_id(|message: &Message| message.id.clone())
        .pass_lease(|message: &mut Message, lease| message.lease = Some(lease))
}

/// Runs an attempt that loses its lease while another attempt takes over. `other` is the result of
/// the other attempt's handler.
pub(crate) async fn zombie(
    store: &RemoteStore,
    other: Result<(), &'static str>,
    before_the_end: impl FnOnce(),
) -> Result<Receipt<()>, ReceiveError<&'static str>> {
    let layer = layer(store.clone()).at_least_once();
    store.fail("renew", [Fault::Before; 1_000]);
    let slow = layer.clone().layer(service_fn(|_: Message| async {
        tokio::time::sleep(Duration::from_secs(100)).await;
        Ok::<_, &str>(())
    }));
    let zombie = tokio::spawn(slow.oneshot(message("m", "")));
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();
    let quick = layer.layer(service_fn(move |_: Message| ready(other)));
    drop(quick.oneshot(message("m", "")).await);
    before_the_end();
    zombie.await.unwrap()
}
