//! The log of the deliveries that consumers got, with their receipts.

use std::collections::BTreeMap;
use std::path::Path;

use tower_idempotency::receiver::{Disposition, Receipt, ReceiveError};

use crate::Ledger;

/// Records the receipt of every delivery of all processes, and loses some acknowledgements.
#[derive(Clone, Debug)]
pub struct DeliveryLog(Ledger);

/// On average, one in this number of acknowledgements is lost.
const LOSES_ONE_IN: u32 = 10;

impl DeliveryLog {
    /// Opens the log at this path.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be opened.
    pub fn open(path: &Path) -> Self {
        Self(Ledger::open(path))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Records a delivery, and returns the disposition for the broker. Returns `None` if the
    /// consumer must lose this acknowledgement.
    ///
    /// # Panics
    ///
    /// Panics if the line cannot be written.
    pub fn record<T, E>(
        &self,
        is_first_delivery: bool,
        received: &Result<Receipt<T>, ReceiveError<E>>,
        disposition: Disposition,
    ) -> Option<Disposition> {
        self.0.append(format_args!("{} {is_first_delivery}", word(received)));
        let is_lost = disposition == Disposition::Acknowledge && crate::one_in(LOSES_ONE_IN);
        (!is_lost).then_some(disposition)
    }

    /// Returns the number of deliveries for each receipt.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn receipts(&self) -> BTreeMap<String, usize> {
        self.0.counts()
    }

    /// Returns the number of deliveries that were not the first of their message.
    ///
    /// # Panics
    ///
    /// Panics if the file cannot be read.
    pub fn redeliveries(&self) -> usize {
        self.0.lines().iter().filter(|line| line.ends_with(" false")).count()
    }
}

/// Returns one word for the result of a delivery.
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
