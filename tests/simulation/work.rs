//! The work under a key: a payment at the bank. A check finds out whether a lost attempt paid.

use std::panic::resume_unwind;
use std::time::Duration;

use tower_idempotency::Recovered;

use crate::bank::{BankReply, BankRequest};
use crate::history::Event;
use crate::link::Link;
use crate::plan::Mode;
use crate::random::Random;

/// The pause in the middle of a slow body.
pub(crate) const BODY_PAUSE: Duration = Duration::from_millis(700);
/// The longest time of a handler, with its call to the bank and its body.
pub(crate) const HANDLER: Duration = Duration::from_millis(1_500 + 1_500 + 500 + 700);

/// One attempt at a payment.
pub(crate) struct Attempt {
    pub(crate) key: usize,
    /// The number of the request.
    pub(crate) request: usize,
    pub(crate) number: u32,
    pub(crate) fence: u64,
    /// The id for the bank, which is the same in every attempt.
    pub(crate) id: String,
}

/// The failure of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The layer decides by its setting for failures.
    AsSet,
    /// The handler knows that it had no effect, and says so.
    WithoutEffect,
}

/// The kind of a response, at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Usual,
    /// The layer stores only that the handler ran.
    NotStored,
    TooLong,
    /// The body comes in two parts, with a pause between them.
    Slow,
    /// The body breaks off.
    Broken,
}

/// Pays, and returns the text of the response.
pub(crate) async fn pay(link: &Link, seed: u64, mode: Mode, attempt: Attempt) -> Result<(String, Size), Failed> {
    let Attempt {
        key,
        request,
        number,
        fence,
        id,
    } = attempt;
    let (process, incarnation) = (link.sender.process, link.sender.incarnation);
    link.note(Event::Began {
        key,
        process,
        request,
        attempt: number,
        fence,
    });
    let mut random = Random::new(seed, fence ^ 0x5eed);
    let fails = |had_no_effect| {
        link.note(Event::Failed {
            key,
            attempt: number,
            had_no_effect,
        });
    };
    let releases = mode == Mode::ReleaseFailures;
    tokio::time::sleep(random.millis(0..1_500)).await;
    match random.below(20) {
        0 => {
            fails(releases);
            return Err(Failed::AsSet);
        }
        1 | 2 => {
            fails(true);
            return Err(Failed::WithoutEffect);
        }
        3 => {
            fails(releases);
            // Panic without the panic hook, which would print a message.
            resume_unwind(Box::new("the handler panics"));
        }
        _ => {}
    }
    let charge = BankRequest::Charge { key, id, fence };
    let limit = match mode {
        Mode::ReleaseFailures => Duration::from_secs(3_600),
        _ => Duration::from_millis(500),
    };
    let Ok(Ok(BankReply::Receipt(receipt))) = tokio::time::timeout(limit, link.bank(charge)).await else {
        fails(false);
        return Err(Failed::AsSet);
    };
    tokio::time::sleep(random.millis(0..1_500)).await;
    if !releases && random.chance(10) {
        fails(false);
        return Err(Failed::AsSet);
    }
    if !releases && random.chance(4) {
        fails(false);
        resume_unwind(Box::new("the handler panics after its effect"));
    }
    let body = format!("receipt {receipt} of attempt {number} in process {process}.{incarnation}\n");
    let size = match random.below(20) {
        0 => Size::NotStored,
        1 => Size::TooLong,
        2 => Size::Slow,
        3 => Size::Broken,
        _ => Size::Usual,
    };
    Ok((body, size))
}

/// Asks the bank for the effect of a lost attempt, and blocks lower fences there.
pub(crate) async fn check(link: &Link, key: usize, id: String, fence: u64) -> Recovered<String> {
    let asking = link.bank(BankRequest::Find { key, id, fence });
    let (recovered, found) = match tokio::time::timeout(Duration::from_millis(300), asking).await {
        Ok(Ok(BankReply::Receipt(receipt))) => (Recovered::Happened(format!("found receipt {receipt}\n")), "an effect"),
        Ok(Ok(_)) => (Recovered::NotHappened, "no effect"),
        Ok(Err(_)) | Err(_) => (Recovered::Unknown, "nothing certain"),
    };
    link.note(Event::Recovered { key, found });
    recovered
}
