//! Where others keep the id of a message.
//!
//! Functions over header maps and plain fields, so that any client of any broker will do; they are given to
//! [`with_id`](super::ReceiverLayer::with_id). Each puts the name of its kind before the id, so that a consumer may get messages
//! from several. What is not there is [missing](MessageId::is_missing).
//!
//! ```
//! use tower_idempotency::receiver::{ids, ReceiverLayer};
//! use tower_idempotency::MemoryStore;
//!
//! type Request = http::Request<bytes::Bytes>;
//! let layer = ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|request: &Request| ids::github(request.headers()));
//! ```
//!
//! The names of the fields are those of the providers' documentation in 2026.

use http::{HeaderMap, HeaderName};

use super::id::MessageId;

/// How a CloudEvent travels in "binary mode", in which its attributes are headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloudEvents {
    /// Application properties `cloudEvents:id` or `cloudEvents_id` (AMQP binding, section 3.1.3).
    Amqp,
    /// Header fields `ce-id` (HTTP binding, section 3.1.3). Their values are compared as they were sent, percent signs and all.
    Http,
    /// Headers `ce_id` (Kafka binding, section 3.2.3).
    Kafka,
    /// Headers `ce-id` (NATS binding, section 3.2.3).
    Nats,
}

impl CloudEvents {
    const fn names(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Amqp => &[
                ("cloudEvents:source", "cloudEvents:id"),
                ("cloudEvents_source", "cloudEvents_id"),
            ],
            Self::Http | Self::Nats => &[("ce-source", "ce-id")],
            Self::Kafka => &[("ce_source", "ce_id")],
        }
    }
}

/// A CloudEvent: producers must see to it that source *and* id are unique together (CloudEvents 1.0.2, section "id"), and an id alone
/// says nothing.
#[must_use]
pub fn cloud_event(source: impl AsRef<[u8]>, id: impl AsRef<[u8]>) -> MessageId {
    MessageId::of([b"cloudevents", source.as_ref(), id.as_ref()])
}

/// A CloudEvent in binary mode, whose headers are looked up by `header`. Where a binding has two names for each, the first pair of
/// which neither is absent or empty counts.
///
/// ```
/// use std::collections::HashMap;
/// use tower_idempotency::receiver::ids::{cloud_event, cloud_event_in, CloudEvents};
///
/// let headers = HashMap::from([("ce_source", "/orders"), ("ce_id", "7")]);
/// let id = cloud_event_in(CloudEvents::Kafka, |name| headers.get(name).copied());
/// assert_eq!(id, cloud_event("/orders", "7"));
/// ```
pub fn cloud_event_in<V: AsRef<[u8]>>(binding: CloudEvents, header: impl Fn(&str) -> Option<V>) -> MessageId {
    let pairs = binding.names().iter();
    let mut ids = pairs.filter_map(|(source, id)| Some(cloud_event(header(source)?, header(id)?)));
    ids.find(|id| !id.is_missing()).unwrap_or_else(MessageId::missing)
}

/// A CloudEvent over HTTP in binary mode.
#[must_use]
pub fn cloud_event_over_http(headers: &HeaderMap) -> MessageId {
    cloud_event_in(CloudEvents::Http, |name| headers.get(name))
}

/// A webhook of Standard Webhooks 1.0 or Svix: `webhook-id`, or `svix-id` if there is no such field. Both names mean the same webhook. The
/// id is the same in every attempt.
#[must_use]
pub fn standard_webhooks(headers: &HeaderMap) -> MessageId {
    let id = headers.get("webhook-id").or_else(|| headers.get("svix-id"));
    optional("standard-webhooks", id)
}

#[cfg(feature = "webhooks")]
pub(super) fn standard_webhook(id: &str) -> MessageId {
    named("standard-webhooks", id.as_bytes())
}

/// A webhook of GitHub: `X-GitHub-Delivery`, which a redelivery repeats.
#[must_use]
pub fn github(headers: &HeaderMap) -> MessageId {
    field("github", headers, "x-github-delivery")
}

const SHOPIFY_IDS: [&str; 2] = ["x-shopify-event-id", "x-shopify-webhook-id"];
const SHOPIFY_SHOP: [&str; 2] = ["x-shopify-shop-domain", "x-shopify-topic"];

/// The fields that make up the id of a webhook of Shopify.
#[cfg(feature = "webhooks")]
pub(super) const SHOPIFY: [&str; 4] = [SHOPIFY_IDS[0], SHOPIFY_IDS[1], SHOPIFY_SHOP[0], SHOPIFY_SHOP[1]];

/// A webhook of Shopify: shop, topic and `X-Shopify-Event-Id`, or `X-Shopify-Webhook-Id` if there is no such field. One event can cause
/// webhooks of several topics.
#[must_use]
pub fn shopify(headers: &HeaderMap) -> MessageId {
    let value = |name: &str| headers.get(name).map_or(&b""[..], |value| value.as_bytes());
    let id = SHOPIFY_IDS.iter().map(|name| value(name)).find(|id| !id.is_empty());
    let shop = SHOPIFY_SHOP.map(value);
    id.map_or_else(MessageId::missing, |id| {
        MessageId::with_optional("shopify", [shop[0], shop[1], id])
    })
}

/// A webhook of Twilio: `I-Twilio-Idempotency-Token`.
#[must_use]
pub fn twilio(headers: &HeaderMap) -> MessageId {
    field("twilio", headers, "i-twilio-idempotency-token")
}

/// An event of Stripe: the member `id` of its body, `evt_...`.
#[must_use]
pub fn stripe(event: impl AsRef<[u8]>) -> MessageId {
    named("stripe", event.as_ref())
}

/// An event of Slack: the member `event_id` of its body, `Ev...`. Slash commands and interactions have none.
#[must_use]
pub fn slack(event: impl AsRef<[u8]>) -> MessageId {
    named("slack", event.as_ref())
}

/// An event of Square: the member `event_id` of its body.
#[must_use]
pub fn square(event: impl AsRef<[u8]>) -> MessageId {
    named("square", event.as_ref())
}

/// An event of PayPal: the member `id` of its body, `WH-...`.
#[must_use]
pub fn paypal(event: impl AsRef<[u8]>) -> MessageId {
    named("paypal", event.as_ref())
}

/// A standard notification of Adyen: the members `merchantAccountCode`, `eventCode`, `pspReference` and `success` of its item. Adyen
/// repeats the first three when it sends a notification again. With another `success` it is a notification of its own, because the
/// outcome has changed.
///
/// The account is a part of the id because `REPORT_AVAILABLE` has the file name of the report as its `pspReference`, such as
/// `settlement_detail_report_batch_12.csv`, and other merchant accounts have reports of the same name.
#[must_use]
pub fn adyen(
    merchant_account: impl AsRef<[u8]>,
    event_code: impl AsRef<[u8]>,
    psp_reference: impl AsRef<[u8]>,
    success: impl AsRef<[u8]>,
) -> MessageId {
    let (account, event) = (merchant_account.as_ref(), event_code.as_ref());
    MessageId::of([b"adyen", account, event, psp_reference.as_ref(), success.as_ref()])
}

/// A message over AMQP: the property `message-id`. Brokers set none, and few clients do by themselves: have the producer set it first, or
/// say what to do [without](super::ReceiverLayer::on_missing_id), for it rejects every message.
#[must_use]
pub fn amqp<I: AsRef<[u8]>>(message_id: Option<I>) -> MessageId {
    optional("amqp", message_id)
}

/// A message over NATS: the header `Nats-Msg-Id`. JetStream itself removes copies for two minutes only, by default.
#[must_use]
pub fn nats<I: AsRef<[u8]>>(msg_id: Option<I>) -> MessageId {
    optional("nats", msg_id)
}

/// A message of Kafka's under an id that its producer put into a header.
#[must_use]
pub fn kafka<I: AsRef<[u8]>>(header: Option<I>) -> MessageId {
    optional("kafka", header)
}

/// A message of Kafka's by its place. It tells redeliveries to one consumer, whose name should be the group's, but not what the
/// producer sent twice; and it starts again from zero where a topic is made again.
#[must_use]
pub fn kafka_offset(topic: &str, partition: i32, offset: i64) -> MessageId {
    let (partition, offset) = (partition.to_be_bytes(), offset.to_be_bytes());
    MessageId::of([b"kafka-offset", topic.as_bytes(), &partition, &offset])
}

/// A message of Amazon SQS: the queue's own `MessageId`. It tells redeliveries, but not what the producer sent twice.
#[must_use]
pub fn sqs(message_id: &str) -> MessageId {
    named("sqs", message_id.as_bytes())
}

/// A message of a FIFO queue of Amazon SQS: its `MessageGroupId` and its `MessageDeduplicationId`, for producers that never use a
/// deduplication id of a group for a second message.
///
/// **Not** where the queue has `ContentBasedDeduplication`, nor where ids are used again: SQS compares deduplication ids for 5 minutes
/// only, the receiver for its whole retention, 7 days by default. There the id is a hash of the body, and a second message with an equal
/// body, or a used id, would be acknowledged and never handled. Take [`sqs`] there, or an id that the producer put into an attribute,
/// `MessageId::of(["attribute", id])`. SQS tells both only to a `ReceiveMessage` that asks for them; an empty one is missing.
#[must_use]
pub fn sqs_fifo(message_group_id: &str, deduplication_id: &str) -> MessageId {
    MessageId::of(["sqs-fifo", message_group_id, deduplication_id])
}

fn field(kind: &str, headers: &HeaderMap, name: &'static str) -> MessageId {
    optional(kind, headers.get(HeaderName::from_static(name)))
}

fn optional<I: AsRef<[u8]>>(kind: &str, id: Option<I>) -> MessageId {
    id.map_or_else(MessageId::missing, |id| named(kind, id.as_ref()))
}

fn named(kind: &str, id: &[u8]) -> MessageId {
    MessageId::of([kind.as_bytes(), id])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), http::HeaderValue::from_static(value)));
        fields.collect()
    }

    #[test]
    fn fields_are_found_and_absent_or_empty_ones_are_missing() {
        type IdOf = fn(&HeaderMap) -> MessageId;
        let of: [(IdOf, &str); 6] = [
            (standard_webhooks, "webhook-id"),
            (standard_webhooks, "svix-id"),
            (github, "x-github-delivery"),
            (shopify, "x-shopify-event-id"),
            (shopify, "x-shopify-webhook-id"),
            (twilio, "i-twilio-idempotency-token"),
        ];
        for (id, name) in of {
            let [one, two, empty] = ["1", "2", ""].map(|value| id(&headers(&[(name, value)])));
            assert_ne!(one, two, "{name}");
            assert!(
                !one.is_missing() && empty.is_missing() && id(&headers(&[])).is_missing(),
                "{name}"
            );
        }
        assert!(amqp(None::<&str>).is_missing() && nats(Some("")).is_missing() && kafka(Some(b"")).is_missing());
        assert!(stripe("").is_missing() && sqs("").is_missing());
        assert!(slack("").is_missing() && square("").is_missing() && paypal("").is_missing());
        assert!(adyen("", "CAPTURE", "1", "true").is_missing() && adyen("shop", "", "1", "true").is_missing());
        assert!(adyen("shop", "CAPTURE", "", "true").is_missing() && adyen("shop", "CAPTURE", "1", "").is_missing());
        assert!(sqs_fifo("", "1").is_missing() && sqs_fifo("1", "").is_missing());
    }

    #[test]
    fn svix_and_standard_names_mean_the_same_webhook() {
        let standard = standard_webhooks(&headers(&[("webhook-id", "1"), ("svix-id", "2")]));
        assert_eq!(standard, standard_webhooks(&headers(&[("webhook-id", "1")])));
        assert_eq!(standard, standard_webhooks(&headers(&[("svix-id", "1")])));
    }

    #[test]
    fn kinds_do_not_meet() {
        let all = [
            standard_webhooks(&headers(&[("webhook-id", "1")])),
            github(&headers(&[("x-github-delivery", "1")])),
            twilio(&headers(&[("i-twilio-idempotency-token", "1")])),
            shopify(&headers(&[("x-shopify-event-id", "1")])),
            shopify(&headers(&[("x-shopify-event-id", "1"), ("x-shopify-topic", "t")])),
            shopify(&headers(&[("x-shopify-event-id", "1"), ("x-shopify-shop-domain", "t")])),
            stripe("1"),
            slack("1"),
            square("1"),
            paypal("1"),
            adyen("shop", "CAPTURE", "1", "true"),
            adyen("shop", "CAPTURE", "1", "false"),
            adyen("shop", "REFUND", "1", "true"),
            adyen("other shop", "CAPTURE", "1", "true"),
            amqp(Some("1")),
            nats(Some("1")),
            kafka(Some("1")),
            sqs("1"),
            sqs_fifo("1", "1"),
            sqs_fifo("1", "2"),
            // The same deduplication id in another group is another message.
            sqs_fifo("2", "1"),
            cloud_event("1", "1"),
            kafka_offset("1", 1, 1),
            kafka_offset("1", 1, 2),
            kafka_offset("1", 2, 1),
            kafka_offset("2", 1, 1),
            MessageId::from("1"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    #[test]
    fn a_cloud_event_is_source_and_id_together_in_every_binding() {
        let id = cloud_event("/a", "1");
        assert_ne!(id, cloud_event("/b", "1"));
        assert_ne!(id, cloud_event("/a1", ""));
        assert!(cloud_event("/a", "").is_missing() && cloud_event("", "1").is_missing());
        for (binding, source_name, id_name) in [
            (CloudEvents::Amqp, "cloudEvents:source", "cloudEvents:id"),
            (CloudEvents::Amqp, "cloudEvents_source", "cloudEvents_id"),
            (CloudEvents::Http, "ce-source", "ce-id"),
            (CloudEvents::Kafka, "ce_source", "ce_id"),
            (CloudEvents::Nats, "ce-source", "ce-id"),
        ] {
            let both = |name: &str| match name {
                name if name == source_name => Some("/a"),
                name if name == id_name => Some("1"),
                _ => None,
            };
            assert_eq!(cloud_event_in(binding, both), id, "{binding:?}");
            let alone = |name: &str| (name == id_name).then_some("1");
            assert!(cloud_event_in(binding, alone).is_missing(), "{binding:?}");
        }
        assert_eq!(
            cloud_event_over_http(&headers(&[("ce-source", "/a"), ("ce-id", "1")])),
            id
        );
    }

    /// The first pair was found, and was missing, so that the second was never looked for.
    #[test]
    fn an_empty_pair_does_not_hide_a_good_one() {
        for (source, id) in [("", "1"), ("/b", ""), ("", "")] {
            let header = |name: &str| match name {
                "cloudEvents:source" => Some(source),
                "cloudEvents:id" => Some(id),
                "cloudEvents_source" => Some("/a"),
                "cloudEvents_id" => Some("2"),
                _ => None,
            };
            assert_eq!(cloud_event_in(CloudEvents::Amqp, header), cloud_event("/a", "2"));
        }
    }

    #[test]
    fn optional_parts_may_be_empty_and_meet_no_id_of_a_users() {
        let shopify = shopify(&headers(&[("x-shopify-event-id", "1")]));
        assert!(!shopify.is_missing());
        assert_ne!(shopify, MessageId::of(["shopify", "", "", "1"]));
        let same_parts = MessageId::of(["", "shopify", "", "", "1"]);
        assert!(same_parts.is_missing() && same_parts != shopify);
    }
}
