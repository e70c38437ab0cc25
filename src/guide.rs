//! Guides: pages about one subject each, with examples.
//!
//! | page | question |
//! |---|---|
//! | [`responses`] | Which responses are stored, and why? |
//! | [`layers`] | How does the layer fit among timeouts, CORS, routes and other layers? |

#[doc = include_str!("../docs/layers.md")]
pub mod layers {}

#[doc = include_str!("../docs/responses.md")]
pub mod responses {}
