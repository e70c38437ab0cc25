//! The signature schemes of the providers, one file each.

mod adyen;
mod ed25519;
mod form;
mod github;
mod paypal;
mod shopify;
mod slack;
mod square;
mod standard;
mod stripe;
mod twilio;
mod unique_json;

pub use adyen::{AdyenPlatformWebhooks, AdyenWebhooks};
pub use github::GitHubWebhooks;
pub use paypal::PayPalWebhooks;
pub use shopify::ShopifyWebhooks;
pub use slack::SlackWebhooks;
pub use square::SquareWebhooks;
pub use standard::StandardWebhooks;
pub use stripe::StripeWebhooks;
pub use twilio::TwilioWebhooks;

/// The parts that the signer of the test kit shares with the checks.
#[cfg(feature = "testing")]
pub(in crate::receiver) mod signing {
    pub(in crate::receiver) use super::adyen::{decoded_key, sign_item, Item};
    pub(in crate::receiver) use super::paypal::{paypal_time, signed_text};
    pub(in crate::receiver) use super::standard::decoded_secret;
    pub(in crate::receiver) use super::twilio::{body_hash, is_form, PublicUrl, Signed};
}
