//! The layer around gRPC services: those of tonic, and responses that no tonic service sends.

mod calls;
mod compression;
mod kit;
mod streams;
mod verdicts;
