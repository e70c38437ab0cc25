//! JetStream: its streams and consumer, and the dispositions of messages.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, AckKind, Context, Message, stream};
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use futures::StreamExt;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::{Service, ServiceExt};
use tower_idempotency::receiver::{Disposition, Receipt, ReceiveError};

use crate::{Error, Event};

/// The stream of events.
const EVENTS: &str = "EVENTS";
/// The stream of dead letters: events for which another delivery is useless.
const DEAD: &str = "DEAD";
/// The stream in which JetStream reports the messages that it has given up.
const GIVEN_UP: &str = "GIVEN_UP";
/// The durable consumer that all processes share.
const GROUP: &str = "mediator";

/// How long JetStream keeps a request for messages. A restart of JetStream loses such requests, and
/// the client does not always notice. Then it asks again 5 s after this time.
const PULL_EXPIRES: Duration = Duration::from_secs(5);

/// The settings for deliveries.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long JetStream waits for a reply to a message before it delivers the message again.
    pub ack_wait: Duration,
    /// Whether the consumer reports progress while a handler runs. Otherwise JetStream delivers a
    /// slow message again in the meantime.
    pub reports_progress: bool,
    /// The number of deliveries after which JetStream gives a message up. Deliveries that find the
    /// message in flight in another process count, too.
    pub max_deliver: i64,
    /// The pause before a failed message is delivered again. It doubles with each delivery, up to
    /// about a thousand times.
    pub pause: Duration,
    /// The number of messages that a process handles at the same time.
    pub concurrency: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ack_wait: Duration::from_secs(30),
            reports_progress: true,
            max_deliver: 20,
            pause: Duration::from_millis(100),
            concurrency: 16,
        }
    }
}

/// A connection to JetStream.
#[derive(Clone, Debug)]
pub struct Broker {
    context: Context,
    settings: Settings,
}

impl Broker {
    /// Connects, and creates the streams and the consumer if they do not exist.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached, or refuses.
    pub async fn connect(url: &str, settings: Settings) -> Result<Self, Error> {
        let context = jetstream::new(async_nats::connect(url).await?);
        let events = stream::Config {
            name: EVENTS.to_owned(),
            subjects: vec!["events.>".to_owned()],
            // JetStream itself drops a second copy within this window. Only the receiver can detect
            // a later copy. The window is short here, so that the receiver gets many copies.
            duplicate_window: Duration::from_millis(100),
            ..stream::Config::default()
        };
        let dead = stream::Config {
            name: DEAD.to_owned(),
            subjects: vec!["dead.>".to_owned()],
            ..stream::Config::default()
        };
        let given_up = stream::Config {
            name: GIVEN_UP.to_owned(),
            subjects: vec![format!("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{EVENTS}.{GROUP}")],
            ..stream::Config::default()
        };
        for config in [events, dead, given_up] {
            context.get_or_create_stream(config).await?;
        }
        let broker = Self { context, settings };
        broker.consumer().await?;
        Ok(broker)
    }

    /// Publishes an event, and waits until JetStream has stored it.
    ///
    /// # Errors
    ///
    /// Fails if JetStream does not confirm the event. JetStream may still have stored the event, so
    /// publish it again with the same headers.
    pub async fn publish(&self, headers: HeaderMap, payload: impl Into<Bytes> + Send) -> Result<(), Error> {
        let message = PublishMessage::build().headers(headers).payload(payload.into());
        self.context.send_publish("events.order", message).await?.await?;
        Ok(())
    }

    /// Handles messages until the connection is closed. `decide` returns the disposition of each
    /// message, or `None` to send no reply.
    ///
    /// # Errors
    ///
    /// Fails when JetStream delivers no further messages.
    pub async fn consume<S, T, E>(
        &self,
        receiver: S,
        decide: impl Fn(&Message, Result<Receipt<T>, ReceiveError<E>>) -> Option<Disposition> + Clone + Send + 'static,
    ) -> Result<(), Error>
    where
        S: Service<Event, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
        S::Future: Send,
        T: Send,
        E: Send,
    {
        let concurrency = self.settings.concurrency;
        let consumer = self.consumer().await?;
        let stream = consumer
            .stream()
            .max_messages_per_batch(concurrency)
            .expires(PULL_EXPIRES);
        let mut messages = stream.messages().await?;
        let free = Arc::new(Semaphore::new(concurrency));
        let mut deliveries = JoinSet::new();
        loop {
            let permit = Arc::clone(&free).acquire_owned().await?;
            while deliveries.try_join_next().is_some() {}
            match messages.next().await {
                Some(Ok(message)) => {
                    let (broker, receiver, decide) = (self.clone(), receiver.clone(), decide.clone());
                    deliveries.spawn(async move {
                        broker.deliver(message, receiver, decide).await;
                        drop(permit);
                    });
                }
                Some(Err(error)) => eprintln!("cannot get messages for now: {error}"),
                None => return Err("JetStream delivers no further messages".into()),
            }
        }
    }

    async fn deliver<S, T, E>(
        &self,
        message: Message,
        receiver: S,
        decide: impl Fn(&Message, Result<Receipt<T>, ReceiveError<E>>) -> Option<Disposition>,
    ) where
        S: Service<Event, Response = Receipt<T>, Error = ReceiveError<E>>,
    {
        let received = self.reporting(&message, receiver.oneshot(Event::of(&message))).await;
        if let Some(disposition) = decide(&message, received)
            && let Err(error) = self.settle(&message, disposition).await
        {
            eprintln!("JetStream did not get the disposition of a message, and will deliver it again: {error}");
        }
    }

    /// Runs a handler, and meanwhile reports progress to JetStream, early enough that JetStream
    /// does not deliver the message to another consumer.
    async fn reporting<F: Future>(&self, message: &Message, handling: F) -> F::Output {
        let Settings {
            ack_wait,
            reports_progress,
            ..
        } = self.settings;
        let mut handling = pin!(handling);
        loop {
            match tokio::time::timeout(ack_wait / 3, &mut handling).await {
                Ok(handled) => return handled,
                Err(_) if reports_progress => drop(message.ack_with(AckKind::Progress).await),
                Err(_) => {}
            }
        }
    }

    /// Sends the disposition of a message to JetStream.
    async fn settle(&self, message: &Message, disposition: Disposition) -> Result<(), Error> {
        match disposition {
            Disposition::Acknowledge => message.ack().await,
            Disposition::Redeliver(pause) => {
                let pause = match pause {
                    Some(pause) => pause,
                    None => self.pause(message.info()?.delivered),
                };
                message.ack_with(AckKind::Nak(Some(pause))).await
            }
            Disposition::Reject => {
                let sequence = message.info()?.stream_sequence;
                let headers = message.headers.clone().unwrap_or_default();
                self.add_dead_letter(sequence, &message.subject, headers, message.payload.clone())
                    .await?;
                message.ack_with(AckKind::Term).await
            }
        }
    }

    fn pause(&self, delivered: i64) -> Duration {
        let doublings = u32::try_from(delivered - 1).unwrap_or(0).min(10);
        self.settings.pause * 2_u32.pow(doublings)
    }

    /// Copies a message to the stream of dead letters, with its headers. The copy has its sequence
    /// number as the id of NATS, so that the stream stores it once.
    async fn add_dead_letter(
        &self,
        sequence: u64,
        subject: &Subject,
        mut headers: HeaderMap,
        payload: Bytes,
    ) -> Result<(), Error> {
        if let Some(id) = headers.get(NATS_MESSAGE_ID).cloned() {
            headers.insert("Original-Msg-Id", id);
        }
        headers.insert(NATS_MESSAGE_ID, sequence.to_string());
        let message = PublishMessage::build().headers(headers).payload(payload);
        let stored = self.context.send_publish(format!("dead.{subject}"), message).await?;
        stored.await?;
        Ok(())
    }

    /// Copies the messages that JetStream gives up to the stream of dead letters, until the
    /// connection is closed. A consumer cannot do this, because the message may be what kills the
    /// consumer.
    ///
    /// # Errors
    ///
    /// Fails when JetStream reports no further messages.
    pub async fn collect_dead_letters(&self) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Advisory {
            stream_seq: u64,
        }
        let events = self.context.get_stream(EVENTS).await?;
        let given_up = self.context.get_stream(GIVEN_UP).await?;
        let config = pull::Config {
            durable_name: Some("collector".to_owned()),
            ..pull::Config::default()
        };
        let advisories = given_up.get_or_create_consumer("collector", config).await?;
        let mut advisories = advisories.messages().await?;
        while let Some(advisory) = advisories.next().await {
            let advisory = advisory?;
            let Advisory { stream_seq } = serde_json::from_slice(&advisory.payload)?;
            let message = events.get_raw_message(stream_seq).await?;
            self.add_dead_letter(stream_seq, &message.subject, message.headers, message.payload)
                .await?;
            advisory.ack().await?;
        }
        Err("JetStream reports no further messages".into())
    }

    /// Whether every message is settled, and none is waiting.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached.
    pub async fn is_drained(&self) -> Result<bool, Error> {
        let mut consumer = self.consumer().await?;
        let info = consumer.info().await?;
        Ok(info.num_pending == 0 && info.num_ack_pending == 0)
    }

    /// Returns the number of events that JetStream has stored.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached.
    pub async fn stored(&self) -> Result<u64, Error> {
        let stream = self.context.get_stream(EVENTS).await?;
        Ok(stream.cached_info().state.messages)
    }

    /// Returns the payloads of the dead letters.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached.
    pub async fn dead(&self) -> Result<Vec<Bytes>, Error> {
        let stream = self.context.get_stream(DEAD).await?;
        let mut dead = Vec::new();
        for sequence in 1..=stream.cached_info().state.last_sequence {
            dead.push(stream.get_raw_message(sequence).await?.payload);
        }
        Ok(dead)
    }

    async fn consumer(&self) -> Result<PullConsumer, Error> {
        let config = pull::Config {
            durable_name: Some(GROUP.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.settings.ack_wait,
            max_deliver: self.settings.max_deliver,
            ..pull::Config::default()
        };
        let stream = self.context.get_stream_no_info(EVENTS).await?;
        Ok(stream.get_or_create_consumer(GROUP, config).await?)
    }
}
