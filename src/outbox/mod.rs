//! The transactional outbox: messages that are sent if, and only if, the transaction is committed that they belong to.
//!
//! To change a database and to tell a broker about it are two systems, and a crash between them loses the message, or sends one about a
//! change that never was. An [`Outbox`] writes the message into a table, in the transaction of the change; a [`Relay`] publishes it
//! afterwards, and may publish it twice: it crashed before it could note that it had, or stood still for longer than the
//! [lease](Relay::with_lease) on what it took. Every copy carries the same [id](OutboxMessage::id), by which a
//! [receiver](crate::receiver) on the other side handles it once.
//!
//! ```no_run
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! use tower_idempotency::outbox::{Outbox, OutboxMessage};
//!
//! let outbox = Outbox::new(pool.clone());
//! outbox.migrate().await?;
//!
//! let mut transaction = pool.begin().await?;
//! sqlx::query("UPDATE orders SET state = 'paid' WHERE id = 7").execute(&mut *transaction).await?;
//! outbox.put(&mut transaction, &OutboxMessage::new("orders.paid", "7")).await?;
//! transaction.commit().await?;
//!
//! let relay = outbox.relay(|message: OutboxMessage| async move {
//!     println!("{} bytes for {}", message.payload().len(), message.topic());
//!     Ok::<_, std::io::Error>(())
//! });
//! tokio::spawn(relay.run());
//! # Ok(())
//! # }
//! ```
//!
//! # Rights
//!
//! A role that may not make tables can use an existing table. It needs the rights below. A role that only puts messages
//! into the outbox needs INSERT and SELECT.
//!
//! ```sql
//! GRANT USAGE ON SCHEMA public TO web;
//! GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_outbox TO web;
//! ```
//!
//! # Order
//!
//! Order is not promised: several relays share the work, and what could not be published is tried again later. One message stops
//! no other, even where it kills the relay, or its row cannot be read; where it kills the relay or hangs, those that were taken with
//! it wait for a lease.

mod message;
mod relay;
mod table;

pub use message::OutboxMessage;
pub use relay::{Published, Relay};
pub use table::Outbox;
