//! A tonic service whose calls take effect once, and a client in Python that checks this.

mod client;
mod payments;

pub use client::run_client;
pub use payments::Bank;

use std::net::SocketAddr;
use std::time::Duration;

use proto::payments_server::PaymentsServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};

/// The generated messages and the generated server.
pub mod proto {
    tonic::include_proto!("payments");
}

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Returns the layer, with settings of its own for the method `Charge`.
pub fn idempotency() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new())
        .grpc()
        .add_grpc_method("/payments.Payments/Charge", |charge| {
            charge
                .require_key()
                .with_retention(Duration::from_secs(7 * 24 * 60 * 60))
        })
}

/// Returns a layer that guards no call, to test that the client notices this.
pub fn no_idempotency() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).with_settings_for(|_| None)
}

/// Serves the bank on a free port until the runtime ends.
///
/// # Errors
///
/// Fails if no port is free.
pub async fn serve<St: Store>(idempotency: IdempotencyLayer<St>, bank: Bank) -> Result<SocketAddr, Error> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let payments = PaymentsServer::new(bank)
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip);
    // The layer wraps the services directly, without other layers between them.
    let server = Server::builder().layer(idempotency).add_service(payments);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Ok(address)
}
