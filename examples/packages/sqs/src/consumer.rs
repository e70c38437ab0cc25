//! A process that consumes a queue.

use std::path::PathBuf;
use std::pin::pin;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use harness::{Ledger, unless_unprotected, up_to, word};
use tokio::time::timeout;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::RedisStore;
use tower_idempotency::receiver::{Disposition, MessageId, Receiver, ReceiverLayer, ids};

use crate::{Error, MESSAGE_ID, client};

/// The settings of a consumer.
#[derive(Clone, Debug)]
pub struct Settings {
    pub server: String,
    pub queue: String,
    /// The URL of the queue of dead letters.
    pub dead: String,
    /// The URL of the Redis with the records.
    pub store: String,
    /// The path of the ledger of effects.
    pub effects: PathBuf,
    /// The path of the ledger of deliveries and their results.
    pub deliveries: PathBuf,
    /// The visibility timeout of the queue. SQS accepts whole seconds.
    pub visibility: Duration,
    /// Whether the consumer extends the visibility timeout while a handler runs.
    pub extends: bool,
    /// The lease: how long a message stays in flight after its consumer died.
    pub lease: Duration,
    /// The consumer loses every n-th deletion: it does not send the request. With 0 it loses none.
    pub lose_every: usize,
}

impl Settings {
    /// Returns a command that runs this program as a consumer.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["consume", &self.server, &self.queue, &self.dead, &self.store])
            .args([&self.effects, &self.deliveries])
            .arg(self.visibility.as_secs().to_string())
            .arg(self.extends.to_string())
            .arg(self.lease.as_millis().to_string())
            .arg(self.lose_every.to_string());
        command
    }

    /// Parses the arguments that [`command`](Self::command) passes, without the first one.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut next = || arguments.next();
        Some(Self {
            server: next()?,
            queue: next()?,
            dead: next()?,
            store: next()?,
            effects: next()?.into(),
            deliveries: next()?.into(),
            visibility: Duration::from_secs(next()?.parse().ok()?),
            extends: next()?.parse().ok()?,
            lease: Duration::from_millis(next()?.parse().ok()?),
            lose_every: next()?.parse().ok()?,
        })
    }
}

/// Consumes until an error occurs.
///
/// # Errors
///
/// Fails if the SQS client or the store reports an error.
pub async fn consume(settings: Settings) -> Result<(), Error> {
    let store = RedisStore::connect(&settings.store).await?;
    let handler = Handler {
        effects: Ledger::open(&settings.effects),
    };
    let layer = ReceiverLayer::new(store, "billing")
        .with_id(message_id)
        .with_lease(settings.lease);
    let consumer = Consumer {
        receiver: unless_unprotected(layer).layer(handler),
        client: client(&settings.server),
        deliveries: Ledger::open(&settings.deliveries),
        deletions: AtomicUsize::new(0),
        settings,
    };
    loop {
        consumer.batch().await?;
    }
}

/// Returns the id of a message: the one that the producer chose, if there is one. Otherwise, in a
/// FIFO queue, the id is the group and the deduplication id, because the producer of this example
/// never uses them for two messages. In other queues it is the id that SQS assigned.
fn message_id(message: &Message) -> MessageId {
    let attributes = message.message_attributes.as_ref();
    if let Some(id) = attributes.and_then(|attributes| attributes.get(MESSAGE_ID)?.string_value()) {
        return MessageId::of(["attribute", id]);
    }
    let system = |name| message.attributes.as_ref()?.get(&name);
    let group = system(MessageSystemAttributeName::MessageGroupId);
    match group.zip(system(MessageSystemAttributeName::MessageDeduplicationId)) {
        Some((group, deduplication)) => ids::sqs_fifo(group, deduplication),
        None => ids::sqs(message.message_id().unwrap_or_default()),
    }
}

struct Consumer {
    receiver: Receiver<Handler, RedisStore, Message>,
    client: Client,
    deliveries: Ledger,
    settings: Settings,
    deletions: AtomicUsize,
}

impl Consumer {
    /// Receives and handles up to ten messages at the same time. Deletes settled messages without
    /// waiting for the others.
    async fn batch(&self) -> Result<(), Error> {
        let receive = self.client.receive_message().queue_url(&self.settings.queue);
        let received = receive
            .max_number_of_messages(10)
            .wait_time_seconds(1)
            .message_attribute_names(MESSAGE_ID)
            .message_system_attribute_names(MessageSystemAttributeName::MessageDeduplicationId)
            .message_system_attribute_names(MessageSystemAttributeName::MessageGroupId)
            .send()
            .await?;
        let messages = received.messages.unwrap_or_default();
        let settling: FuturesUnordered<_> = messages.iter().map(|message| self.settle(message)).collect();
        let mut settled = settling.ready_chunks(10);
        while let Some(handles) = settled.next().await {
            let handles = handles.into_iter().collect::<Result<Vec<_>, _>>()?;
            self.delete(handles.into_iter().flatten()).await?;
        }
        Ok(())
    }

    /// Handles a message. Returns the receipt handle to delete it, or `None` if SQS must deliver it
    /// again.
    async fn settle(&self, message: &Message) -> Result<Option<String>, Error> {
        let body = message.body().unwrap_or_default();
        self.deliveries.append(format_args!("came {body}"));
        let handle = message.receipt_handle().unwrap_or_default();
        let mut handling = pin!(self.receiver.clone().oneshot(message.clone()));
        let received = loop {
            match timeout(self.settings.visibility / 2, &mut handling).await {
                Ok(received) => break received,
                Err(_) if self.settings.extends => self.hide(handle, self.settings.visibility).await?,
                Err(_) => {}
            }
        };
        self.deliveries.append(format_args!("{} {body}", word(&received)));
        match Disposition::of(&received) {
            Disposition::Acknowledge => return Ok(Some(handle.to_owned())),
            Disposition::Redeliver(after) => self.hide(handle, after.unwrap_or(Duration::from_secs(1))).await?,
            Disposition::Reject => {
                let letter = self.client.send_message().queue_url(&self.settings.dead);
                letter.message_body(body).send().await?;
                return Ok(Some(handle.to_owned()));
            }
        }
        Ok(None)
    }

    /// Hides a message for this time from now on, rounded up to whole seconds.
    async fn hide(&self, handle: &str, time: Duration) -> Result<(), Error> {
        let seconds = i32::try_from(time.as_millis().div_ceil(1_000))?;
        let change = self.client.change_message_visibility().queue_url(&self.settings.queue);
        let changed = change.receipt_handle(handle).visibility_timeout(seconds).send().await;
        match changed.map_err(aws_sdk_sqs::error::SdkError::into_service_error) {
            // Another delivery of this message is settled already.
            Err(error) if error.is_message_not_inflight() || error.is_receipt_handle_is_invalid() => Ok(()),
            changed => Ok(changed.map(drop)?),
        }
    }

    /// Deletes messages. If the request or its response is lost, SQS delivers the message again,
    /// and the receiver finds that it is a duplicate.
    async fn delete(&self, handles: impl Iterator<Item = String>) -> Result<(), Error> {
        let mut entries = Vec::new();
        for handle in handles {
            let deletion = self.deletions.fetch_add(1, Ordering::Relaxed) + 1;
            if self.settings.lose_every > 0 && deletion.is_multiple_of(self.settings.lose_every) {
                self.deliveries.append("lost");
                continue;
            }
            let entry = DeleteMessageBatchRequestEntry::builder().id(deletion.to_string());
            entries.push(entry.receipt_handle(handle).build()?);
        }
        if entries.is_empty() {
            return Ok(());
        }
        let delete = self.client.delete_message_batch().queue_url(&self.settings.queue);
        let deleted = delete.set_entries(Some(entries)).send().await?;
        for failed in deleted.failed() {
            self.deliveries.append(format_args!("not-deleted {}", failed.code()));
        }
        Ok(())
    }
}

/// The handler: waits up to 100 ms, has its effect, and waits up to 50 ms. A message `poison`
/// always fails, and a message `slow` takes 5 s longer.
#[derive(Clone)]
struct Handler {
    effects: Ledger,
}

impl Service<Message> for Handler {
    type Response = ();
    type Error = String;
    type Future = BoxFuture<'static, Result<(), String>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Message) -> Self::Future {
        let effects = self.effects.clone();
        async move {
            let name = message.body().unwrap_or_default();
            if name.starts_with("poison") {
                return Err(format!("{name} cannot be handled"));
            }
            if name.starts_with("slow") {
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            tokio::time::sleep(up_to(100)).await;
            effects.append(name);
            tokio::time::sleep(up_to(50)).await;
            Ok(())
        }
        .boxed()
    }
}
