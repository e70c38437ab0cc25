//! Consumers of SQS queues that handle each message once.
//!
//! * The **id** of a message is in the attribute `message-id`, which the producer sets. Without
//!   this attribute, the id of a message in a FIFO queue is its group and deduplication id. This is
//!   safe only if the producer never uses them for two messages, so do not do this with
//!   `ContentBasedDeduplication`. In other queues it is the id that SQS assigned. That id detects
//!   redeliveries, but not a message that its producer sends twice.
//! * The consumer extends the **visibility timeout** while the handler runs. If SQS delivers the
//!   message again nevertheless, the receiver finds it in flight, and the consumer hides it until
//!   the lease of the other delivery ends.
//! * The consumer **deletes** each message as soon as it is settled, also within a batch.
//! * SQS delivers a failed message again, until the **redrive policy** of the queue moves it to the
//!   dead letters. The consumer moves a message that cannot succeed there at once.

mod consumer;
mod moto;

pub use consumer::{Settings, consume};
pub use moto::{Moto, WINDOW};

use std::time::Duration;

use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, MessageAttributeValue, QueueAttributeName};
use aws_sdk_sqs::{Client, Config};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The attribute with the id that the producer chose.
pub const MESSAGE_ID: &str = "message-id";

/// Creates a client of a server that needs no credentials.
#[must_use]
pub fn client(url: &str) -> Client {
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(url)
        .region(Region::from_static("eu-central-1"))
        .credentials_provider(Credentials::new("any", "any", None, None, "example"))
        .retry_config(RetryConfig::standard().with_max_attempts(5));
    Client::from_conf(config.build())
}

/// A queue.
#[derive(Clone, Debug)]
pub struct Queue {
    client: Client,
    pub url: String,
}

impl Queue {
    /// Creates a queue with this visibility timeout, in whole seconds. If its name ends with
    /// `.fifo`, it is a FIFO queue.
    ///
    /// # Errors
    ///
    /// Fails if the SQS client reports an error.
    pub async fn create(client: &Client, name: &str, visibility: Duration, dead: Option<&Self>) -> Result<Self, Error> {
        let visibility = visibility.as_secs().to_string();
        let mut create = client
            .create_queue()
            .queue_name(name)
            .attributes(QueueAttributeName::VisibilityTimeout, visibility);
        if name.ends_with(".fifo") {
            create = create.attributes(QueueAttributeName::FifoQueue, "true");
        }
        if let Some(dead) = dead {
            let arn = dead.attribute(QueueAttributeName::QueueArn).await?;
            let policy = format!(r#"{{"deadLetterTargetArn":"{arn}","maxReceiveCount":"5"}}"#);
            create = create.attributes(QueueAttributeName::RedrivePolicy, policy);
        }
        let url = create
            .send()
            .await?
            .queue_url
            .ok_or("the server returned no URL for the queue")?;
        Ok(Self {
            client: client.clone(),
            url,
        })
    }

    /// Sends a message with this name.
    ///
    /// # Errors
    ///
    /// Fails if the SQS client reports an error.
    pub async fn send(&self, name: &str) -> Result<(), Error> {
        let id = MessageAttributeValue::builder()
            .data_type("String")
            .string_value(format!("id-of-{name}"))
            .build()?;
        let send = self.client.send_message().queue_url(&self.url).message_body(name);
        if self.url.ends_with(".fifo") {
            let fifo = send.message_group_id("orders").message_deduplication_id(name);
            fifo.send().await?;
        } else {
            send.message_attributes(MESSAGE_ID, id).send().await?;
        }
        Ok(())
    }

    /// Returns the number of messages in the queue, visible or not.
    ///
    /// # Errors
    ///
    /// Fails if the SQS client reports an error.
    pub async fn length(&self) -> Result<usize, Error> {
        let request = self.client.get_queue_attributes().queue_url(&self.url);
        let attributes = request
            .attribute_names(QueueAttributeName::ApproximateNumberOfMessages)
            .attribute_names(QueueAttributeName::ApproximateNumberOfMessagesNotVisible)
            .send()
            .await?
            .attributes
            .unwrap_or_default();
        let mut length = 0;
        for number in attributes.values() {
            length += number.parse::<usize>()?;
        }
        Ok(length)
    }

    /// Waits until the queue is empty. SQS counts visible and invisible messages approximately, and
    /// a message that becomes visible at this moment may be in neither count. So the queue must be
    /// empty three times in a row.
    ///
    /// # Errors
    ///
    /// Fails if the SQS client reports an error, or if this takes more than two minutes.
    pub async fn until_empty(&self) -> Result<(), Error> {
        let mut empty = 0;
        for _ in 0..1_200 {
            empty = if self.length().await? == 0 { empty + 1 } else { 0 };
            if empty == 3 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(format!(
            "after two minutes {} messages are still in the queue",
            self.length().await?
        )
        .into())
    }

    /// Removes all messages from the queue, and returns their bodies.
    ///
    /// # Errors
    ///
    /// Fails if the SQS client reports an error.
    pub async fn drain(&self) -> Result<Vec<String>, Error> {
        let mut bodies = Vec::new();
        loop {
            let receive = self.client.receive_message().queue_url(&self.url);
            let received = receive
                .max_number_of_messages(10)
                .send()
                .await?
                .messages
                .unwrap_or_default();
            if received.is_empty() {
                return Ok(bodies);
            }
            // Delete the messages. Otherwise they would be visible again before the last one is
            // received.
            let mut delete = self.client.delete_message_batch().queue_url(&self.url);
            for (number, message) in received.into_iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder().id(number.to_string());
                delete = delete.entries(entry.set_receipt_handle(message.receipt_handle).build()?);
                bodies.extend(message.body);
            }
            let failed = delete.send().await?.failed;
            if let [failure, ..] = failed.as_slice() {
                return Err(format!("cannot delete a message: {}", failure.code).into());
            }
        }
    }

    async fn attribute(&self, name: QueueAttributeName) -> Result<String, Error> {
        let request = self.client.get_queue_attributes().queue_url(&self.url);
        let attributes = request.attribute_names(name.clone()).send().await?.attributes;
        let value = attributes.and_then(|mut attributes| attributes.remove(&name));
        Ok(value.ok_or_else(|| format!("the queue has no attribute {name}"))?)
    }
}
