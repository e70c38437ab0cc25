//! What consumers were told about their deliveries, and what they tell the broker.

use std::collections::BTreeMap;
use std::path::Path;

use tower_idempotency::receiver::{Disposition, Receipt, ReceiveError};

use crate::Ledger;

/// Notes the receipt of every delivery, for all processes, and loses some acknowledgements.
#[derive(Clone, Debug)]
pub struct Told(Ledger);

/// Of so many acknowledgements one is lost.
const LOSES_ONE_IN: u32 = 10;

impl Told {
    /// # Panics
    ///
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Self {
        Self(Ledger::open(path))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Notes a delivery. What to tell the broker; nothing, if that is to be lost.
    ///
    /// # Panics
    ///
    /// If it cannot be noted.
    pub fn note<T, E>(
        &self,
        is_first_delivery: bool,
        received: &Result<Receipt<T>, ReceiveError<E>>,
        disposition: Disposition,
    ) -> Option<Disposition> {
        self.0.note(format_args!("{} {is_first_delivery}", word(received)));
        let is_lost = disposition == Disposition::Acknowledge && crate::one_in(LOSES_ONE_IN);
        (!is_lost).then_some(disposition)
    }

    /// How many deliveries got each receipt.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn receipts(&self) -> BTreeMap<String, usize> {
        self.0.counts()
    }

    /// How many deliveries were not the first of their message.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn redeliveries(&self) -> usize {
        self.0.lines().iter().filter(|line| line.ends_with(" false")).count()
    }
}

/// One word for what came of a delivery.
pub const fn word<T, E>(received: &Result<Receipt<T>, ReceiveError<E>>) -> &'static str {
    match received {
        Ok(Receipt::First(_)) => "first",
        Ok(Receipt::Duplicate) => "duplicate",
        Ok(Receipt::InFlight { .. }) => "in-flight",
        Ok(Receipt::Unknown) => "unknown",
        Err(ReceiveError::Handler(_) | ReceiveError::Panicked) => "failed",
        Err(ReceiveError::Rejected(_)) => "rejected",
        Err(_) => "not-received",
    }
}
