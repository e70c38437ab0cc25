//! The ids of messages from well-known brokers and providers, for
//! [`with_id`](super::ReceiverLayer::with_id).
//!
//! The functions take header maps and plain fields, so that they work with any client of any
//! broker. Each function puts the name of its source before the id, so that a consumer may receive
//! messages from several sources. If the field is absent or empty, the id is
//! [missing](MessageId::is_missing).
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

/// The protocol binding of a CloudEvent in "binary mode", in which the attributes of the event are
/// headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloudEvents {
    /// Application properties `cloudEvents:id` or `cloudEvents_id` (AMQP binding, section 3.1.3).
    Amqp,
    /// Header fields `ce-id` (HTTP binding, section 3.1.3). The layer compares their values as they
    /// were sent, without percent-decoding.
    Http,
    /// Headers `ce_id` (Kafka binding, section 3.2.3).
    Kafka,
    /// Headers `ce-id` (NATS binding, section 3.2.3).
    Nats,
}

impl CloudEvents {
    /// The names of the headers for source and id, in order of preference.
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

/// Returns the id of a CloudEvent, made of its source *and* its id. Producers must make the pair
/// unique (CloudEvents 1.0.2, section "id"). An id without its source is not unique.
#[must_use]
pub fn cloud_event(source: impl AsRef<[u8]>, id: impl AsRef<[u8]>) -> MessageId {
    MessageId::of([b"cloudevents", source.as_ref(), id.as_ref()])
}

/// Returns the id of a CloudEvent in binary mode. `header` looks up a header by its name. If a
/// binding has two pairs of names, the first pair counts whose headers are both present and not
/// empty.
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

/// Returns the id of a CloudEvent over HTTP in binary mode.
#[must_use]
pub fn cloud_event_over_http(headers: &HeaderMap) -> MessageId {
    cloud_event_in(CloudEvents::Http, |name| headers.get(name))
}

/// Returns the id of a webhook of Standard Webhooks 1.0 or Svix: `webhook-id`, or `svix-id` if
/// there is no such field. Both names mean the same webhook. The sender repeats the id in every
/// attempt.
#[must_use]
pub fn standard_webhooks(headers: &HeaderMap) -> MessageId {
    let id = headers.get("webhook-id").or_else(|| headers.get("svix-id"));
    optional("standard-webhooks", id)
}

#[cfg(feature = "webhooks")]
pub(super) fn standard_webhook(id: &str) -> MessageId {
    named("standard-webhooks", id.as_bytes())
}

/// Returns the id of a webhook of GitHub: `X-GitHub-Delivery`. A redelivery repeats it.
#[must_use]
pub fn github(headers: &HeaderMap) -> MessageId {
    field("github", headers, "x-github-delivery")
}

const SHOPIFY_IDS: [&str; 2] = ["x-shopify-event-id", "x-shopify-webhook-id"];
const SHOPIFY_SHOP: [&str; 2] = ["x-shopify-shop-domain", "x-shopify-topic"];

/// The header fields of the id of a webhook of Shopify.
#[cfg(feature = "webhooks")]
pub(super) const SHOPIFY: [&str; 4] = [SHOPIFY_IDS[0], SHOPIFY_IDS[1], SHOPIFY_SHOP[0], SHOPIFY_SHOP[1]];

/// Returns the id of a webhook of Shopify: shop, topic and `X-Shopify-Event-Id`. If that field is
/// absent or empty, `X-Shopify-Webhook-Id` counts instead. The topic is a part of the id because
/// one event can cause webhooks of several topics.
#[must_use]
pub fn shopify(headers: &HeaderMap) -> MessageId {
    let value = |name: &str| headers.get(name).map_or(&b""[..], |value| value.as_bytes());
    let id = SHOPIFY_IDS.iter().map(|name| value(name)).find(|id| !id.is_empty());
    let shop = SHOPIFY_SHOP.map(value);
    id.map_or_else(MessageId::missing, |id| {
        MessageId::with_optional("shopify", [shop[0], shop[1], id])
    })
}

/// Returns the id of a webhook of Twilio: `I-Twilio-Idempotency-Token`.
#[must_use]
pub fn twilio(headers: &HeaderMap) -> MessageId {
    field("twilio", headers, "i-twilio-idempotency-token")
}

/// Returns the id of an event of Stripe: the member `id` of its body, `evt_...`.
#[must_use]
pub fn stripe(event: impl AsRef<[u8]>) -> MessageId {
    named("stripe", event.as_ref())
}

/// Returns the id of an event of Slack: the member `event_id` of its body, `Ev...`. Slash commands
/// and interactions have no such member.
#[must_use]
pub fn slack(event: impl AsRef<[u8]>) -> MessageId {
    named("slack", event.as_ref())
}

/// Returns the id of an event of Square: the member `event_id` of its body.
#[must_use]
pub fn square(event: impl AsRef<[u8]>) -> MessageId {
    named("square", event.as_ref())
}

/// Returns the id of an event of PayPal: the member `id` of its body, `WH-...`.
#[must_use]
pub fn paypal(event: impl AsRef<[u8]>) -> MessageId {
    named("paypal", event.as_ref())
}

/// Returns the id of a standard notification of Adyen: the members `merchantAccountCode`,
/// `eventCode`, `pspReference` and `success` of its item. Adyen repeats the first three when it
/// sends a notification again. A notification with another `success` is another message, because
/// the outcome has changed.
///
/// The account is a part of the id because `REPORT_AVAILABLE` has the file name of the report as
/// its `pspReference`, such as `settlement_detail_report_batch_12.csv`, and other merchant accounts
/// have reports of the same name.
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

/// Returns the id of a message over AMQP: the property `message-id`. Brokers do not set this
/// property, and few clients set it by themselves. By default, a message without an id is rejected.
/// So make the producer set the property first, or choose another treatment with
/// [`on_missing_id`](super::ReceiverLayer::on_missing_id).
#[must_use]
pub fn amqp<I: AsRef<[u8]>>(message_id: Option<I>) -> MessageId {
    optional("amqp", message_id)
}

/// Returns the id of a message over NATS: the header `Nats-Msg-Id`. By default, JetStream itself
/// removes copies for two minutes only.
#[must_use]
pub fn nats<I: AsRef<[u8]>>(msg_id: Option<I>) -> MessageId {
    optional("nats", msg_id)
}

/// Returns the id of a message of Kafka, from a header that its producer sets.
#[must_use]
pub fn kafka<I: AsRef<[u8]>>(header: Option<I>) -> MessageId {
    optional("kafka", header)
}

/// Returns the id of a message of Kafka by its topic, partition and offset. The id recognises
/// redeliveries to one consumer, whose name should be that of its group. It does not recognise a
/// message that the producer sent twice. Offsets start again from zero if a topic is deleted and
/// created again.
#[must_use]
pub fn kafka_offset(topic: &str, partition: i32, offset: i64) -> MessageId {
    let (partition, offset) = (partition.to_be_bytes(), offset.to_be_bytes());
    MessageId::of([b"kafka-offset", topic.as_bytes(), &partition, &offset])
}

/// Returns the id of a message of Amazon SQS: the queue's own `MessageId`. The id recognises
/// redeliveries. It does not recognise a message that the producer sent twice.
#[must_use]
pub fn sqs(message_id: &str) -> MessageId {
    named("sqs", message_id.as_bytes())
}

/// Returns the id of a message of a FIFO queue of Amazon SQS: its `MessageGroupId` and its
/// `MessageDeduplicationId`. Use this for producers that never use a deduplication id of a group
/// for a second message.
///
/// Do **not** use this if the queue has `ContentBasedDeduplication`, or if producers use ids again.
/// SQS compares deduplication ids for 5 minutes only, but the receiver compares them for its whole
/// retention, 7 days by default. With `ContentBasedDeduplication` the deduplication id is a hash of
/// the body. A second message with an equal body, or with a used id, would then be acknowledged and
/// never handled. Use [`sqs`] there, or an id that the producer puts into an attribute:
/// `MessageId::of(["attribute", id])`.
///
/// SQS returns both attributes only if `ReceiveMessage` requests them. If one of them is empty, the
/// id is missing.
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
    fn absent_or_empty_fields_make_missing_ids() {
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
    fn ids_of_different_sources_differ() {
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

    /// An empty first pair once ended the search, so that the second pair was ignored.
    #[test]
    fn empty_first_pair_does_not_hide_the_second_one() {
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
    fn ids_with_optional_parts_differ_from_all_ids_of_the_application() {
        let shopify = shopify(&headers(&[("x-shopify-event-id", "1")]));
        assert!(!shopify.is_missing());
        assert_ne!(shopify, MessageId::of(["shopify", "", "", "1"]));
        let same_parts = MessageId::of(["", "shopify", "", "", "1"]);
        assert!(same_parts.is_missing() && same_parts != shopify);
    }
}
