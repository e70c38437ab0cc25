//! The signature schemes of the providers, one file each.

/// Defines a provider that signs with an HMAC under one of several secrets. `signature` is the name
/// of the header field with the signature, and `verify` checks a webhook under the secrets.
macro_rules! hmac_provider {
    (
        $(#[$docs:meta])*
        pub struct $provider:ident;

        $(#[$docs_of_new:meta])*
        pub fn new(secrets);

        signature: $signature:ident,
        verify: $verify:ident,
    ) => {
        $(#[$docs])*
        #[derive(Clone, Debug)]
        pub struct $provider($crate::receiver::webhooks::signature::Secrets);

        impl $provider {
            $(#[$docs_of_new])*
            ///
            /// # Errors
            ///
            /// [`Configuration`](crate::ErrorKind::Configuration) if there is no secret or an empty
            /// one.
            pub fn new<S: AsRef<[u8]>>(
                secrets: impl IntoIterator<Item = S>,
            ) -> Result<Self, $crate::error::Error> {
                $crate::receiver::webhooks::signature::Secrets::new(secrets).map(Self)
            }
        }

        impl $crate::receiver::webhooks::VerifyWebhook for $provider {
            fn is_signed(&self, headers: &http::HeaderMap) -> bool {
                headers.contains_key($signature)
            }

            fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
                $verify(&self.0, webhook)
            }
        }
    };
}

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
    pub(in crate::receiver) use super::adyen::{Item, decoded_key, sign_item};
    pub(in crate::receiver) use super::paypal::{paypal_time, signed_text};
    pub(in crate::receiver) use super::standard::decoded_secret;
    pub(in crate::receiver) use super::twilio::{PublicUrl, Signed, body_hash, is_form};
}
