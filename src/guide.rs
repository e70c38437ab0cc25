//! Guides: pages about one subject each, with examples.
//!
//! | page | question |
//! |---|---|
//! | `grpc` (feature `tonic`) | How do gRPC services use the layer? |
//! | [`layers`] | How does the layer fit among timeouts, CORS, routes and other layers? |
//! | [`responses`] | Which responses are stored, and why? |
//! | [`testing`] | How do I test my handlers? |

#[cfg(feature = "tonic")]
#[doc = include_str!("../docs/grpc.md")]
pub mod grpc {}

#[doc = include_str!("../docs/layers.md")]
pub mod layers {}

#[doc = include_str!("../docs/responses.md")]
pub mod responses {}

#[cfg(any(
    not(doctest),
    all(
        feature = "axum",
        feature = "conformance",
        feature = "postgres",
        feature = "testing",
        feature = "webhooks"
    )
))]
#[doc = include_str!("../docs/testing.md")]
pub mod testing {}
