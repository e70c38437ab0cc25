//! Consumers of SQS queues that handle each message once.
//!
//! * The **id** is what the producer put into the attribute `message-id`. Where it put none, it is group and deduplication id of a FIFO
//!   queue, whose producer here names each message once and for good (with `ContentBasedDeduplication` it would not do), and else SQS's
//!   own id: that tells redeliveries apart from news, and not what a producer sends twice.
//! * The **visibility timeout** is extended while the handler runs. Should the message be delivered again all the same, it is in
//!   flight, and stays invisible until the other delivery's lease is over.
//! * A message is **deleted** when it is settled, and so are, of a batch, those that are.
//! * What fails comes again until the queue's **redrive policy** makes a dead letter of it; what cannot succeed is made one at once.

mod consumer;
mod moto;

pub use consumer::{consume, Settings};
pub use moto::{Moto, WINDOW};

use std::time::Duration;

use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, MessageAttributeValue, QueueAttributeName};
use aws_sdk_sqs::{Client, Config};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The attribute with the id that the producer chose.
pub const MESSAGE_ID: &str = "message-id";

/// A client of a server that asks for no credentials.
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
    /// Makes a queue, FIFO where its name ends so, whose messages are invisible for so many seconds when they were received.
    ///
    /// # Errors
    ///
    /// As the client has them.
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
        let url = create.send().await?.queue_url.ok_or("a queue has a URL")?;
        Ok(Self {
            client: client.clone(),
            url,
        })
    }

    /// # Errors
    ///
    /// As the client has them.
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

    /// How many messages are in it, visible or not.
    ///
    /// # Errors
    ///
    /// As the client has them.
    pub async fn length(&self) -> Result<usize, Error> {
        let asked = self.client.get_queue_attributes().queue_url(&self.url);
        let attributes = asked
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

    /// Waits until it is empty. The numbers are approximate: a message that becomes visible at that moment may be in neither, so it
    /// looks three times.
    ///
    /// # Errors
    ///
    /// As the client has them; and when that takes more than two minutes.
    pub async fn until_empty(&self) -> Result<(), Error> {
        let mut empty = 0;
        for _ in 0..1_200 {
            empty = if self.length().await? == 0 { empty + 1 } else { 0 };
            if empty == 3 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(format!("{} messages stay in the queue", self.length().await?).into())
    }

    /// Takes out all that is in it: the bodies.
    ///
    /// # Errors
    ///
    /// As the client has them.
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
            // Left in, they would be visible again before the last one is taken.
            let mut delete = self.client.delete_message_batch().queue_url(&self.url);
            for (number, message) in received.into_iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder().id(number.to_string());
                delete = delete.entries(entry.set_receipt_handle(message.receipt_handle).build()?);
                bodies.extend(message.body);
            }
            let failed = delete.send().await?.failed;
            if let [failure, ..] = failed.as_slice() {
                return Err(format!("a message cannot be deleted: {}", failure.code).into());
            }
        }
    }

    async fn attribute(&self, name: QueueAttributeName) -> Result<String, Error> {
        let asked = self.client.get_queue_attributes().queue_url(&self.url);
        let attributes = asked.attribute_names(name.clone()).send().await?.attributes;
        let value = attributes.and_then(|mut attributes| attributes.remove(&name));
        Ok(value.ok_or_else(|| format!("the queue has no {name}"))?)
    }
}
