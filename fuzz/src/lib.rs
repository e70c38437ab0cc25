//! Properties of the code that reads bytes from outside: from clients, from stores and from
//! servers.
//!
//! Each module has one property, a function that panics if the property does not hold for its
//! input. The programs in `fuzz_targets` search for such inputs. The test `cases` checks the
//! property for every stored input.

pub mod authority;
pub mod canonical_json;
mod exchange;
pub mod grpc;
pub mod grpc_response;
mod input;
pub mod key;
pub mod multipart;
pub mod postgres;
pub mod record;
pub mod redis;
pub mod refusal;
pub mod response;
mod server;
pub mod webhook;

/// A function that panics if its property does not hold for the input.
pub type Property = fn(&[u8]);

/// Every property, with the name of its target and of its folders.
pub const PROPERTIES: [(&str, Property); 12] = [
    ("authority", authority::property),
    ("canonical_json", canonical_json::property),
    ("grpc", grpc::property),
    ("grpc_response", grpc_response::property),
    ("key", key::property),
    ("multipart", multipart::property),
    ("postgres", postgres::property),
    ("record", record::property),
    ("redis", redis::property),
    ("refusal", refusal::property),
    ("response", response::property),
    ("webhook", webhook::property),
];
