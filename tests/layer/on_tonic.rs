//! The layer around gRPC services: tonic's own, and responses that no tonic service makes.

mod calls;
mod compression;
mod kit;
mod streams;
mod verdicts;
