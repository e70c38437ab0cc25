//! The transactional outbox: messages that are published if, and only if, the transaction commits
//! to which they belong.
//!
//! A database and a broker are two systems. A crash between a change of the database and its
//! message loses the message, or publishes a message about a change that never happened. An
//! [`Outbox`] writes the message into a table, in the transaction of the change. A [`Relay`]
//! publishes the message afterwards.
//!
//! The relay may publish a message twice: if it crashes before it records the publication, or if it
//! stands still for longer than its [lease](Relay::with_lease) on the message. Every copy carries
//! the same [id](OutboxMessage::id), by which a [receiver](crate::receiver) handles the message
//! once.
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
//! A role that may not make tables can use an existing table. It needs the rights below. A role
//! that only puts messages into the outbox needs INSERT and SELECT.
//!
//! ```sql
//! GRANT USAGE ON SCHEMA public TO web;
//! GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_outbox TO web;
//! ```
//!
//! # Order
//!
//! The outbox does not promise an order. Several relays share the work, and a message that could
//! not be published is tried again later. No message stops the others, even if it kills the relay
//! or its row cannot be read. If a message kills the relay or hangs, the messages that were taken
//! with it wait for a lease.

mod message;
mod relay;
mod table;

pub use message::OutboxMessage;
pub use relay::{Published, Relay};
pub use table::Outbox;
