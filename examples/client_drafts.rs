//! One invoice at a third party that has drafts: a job of two steps, killed in each of them and resumed.
//!
//! ```text
//! cargo run --features axum,once,reqwest --example client_drafts
//! ```
//!
//! A draft has no effect, so a lost one may be made again; to send a draft twice is to send it once, so that may be repeated, too. What
//! must not happen is that the *second* step forgets which draft it is to send: the first step's result is recorded in a store
//! that survives the process (that of `custom_store`; in production Redis or PostgreSQL). The job runs in a process of its own, which is
//! killed when the third party has made the draft but not yet said so, then again when it has sent the invoice but not yet said so.
//!
//! One invoice is sent. What is left behind is a draft that nobody will ever send.

#[expect(dead_code, unreachable_pub, reason = "only the store of that example is needed here")]
mod custom_store;
mod third_party;

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path as Segment, State};
use axum::http::StatusCode;
use axum::routing::{post, put};
use axum::Router;
use custom_store::DirectoryStore;
use third_party::{Accident, Scratch, ThirdParty};
use tokio::process::Command;
use tower_idempotency::client::{once, Attempt, Failure};
use tower_idempotency::Clock;

/// The third party's: for each draft, whether it was sent.
type Invoices = Arc<Mutex<Vec<bool>>>;

async fn draft(State(invoices): State<Invoices>) -> (StatusCode, String) {
    let mut invoices = invoices.lock().unwrap_or_else(PoisonError::into_inner);
    invoices.push(false);
    (StatusCode::CREATED, (invoices.len() - 1).to_string())
}

/// Idempotent by nature: what is sent stays sent.
async fn send(State(invoices): State<Invoices>, Segment(draft): Segment<usize>) -> StatusCode {
    let mut invoices = invoices.lock().unwrap_or_else(PoisonError::into_inner);
    match invoices.get_mut(draft) {
        Some(is_sent) => *is_sent = true,
        None => return StatusCode::NOT_FOUND,
    }
    StatusCode::NO_CONTENT
}

async fn make_draft(attempt: Attempt, url: String) -> Result<String, Failure<reqwest::Error>> {
    println!("  attempt {} at a draft", attempt.number());
    let made = reqwest::Client::new().post(url).send().await?;
    Ok(made.error_for_status()?.text().await?)
}

async fn send_draft(attempt: Attempt, url: String) -> Result<(), Failure<reqwest::Error>> {
    println!("  attempt {} at sending it", attempt.number());
    reqwest::Client::new().put(url).send().await?.error_for_status()?;
    Ok(())
}

/// The job.
async fn invoice(store: DirectoryStore, party: &str) -> Result<(), Box<dyn Error>> {
    // Another process takes over a second after the last sign of life; 30 s is the default.
    let job = once(store, "order-4711")
        .with_lease(Duration::from_secs(1))
        .at_least_once();
    let mut steps = job.steps();

    let url = format!("{party}/invoices");
    let draft = steps.step("draft").run(|attempt| make_draft(attempt, url)).await?;
    println!("  the draft is {}", draft.value());

    let url = format!("{party}/invoices/{}/sent", draft.value());
    steps.step("send").run(|attempt| send_draft(attempt, url)).await?;
    println!("  it is sent");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, party, directory] = &arguments[..] {
        let store = DirectoryStore::open(directory.into(), Clock::system())?;
        return invoice(store, party).await;
    }

    let invoices = Invoices::default();
    let app = Router::new()
        .route("/invoices", post(draft))
        .route("/invoices/{draft}/sent", put(send));
    let party = ThirdParty::serve(app.with_state(Arc::clone(&invoices))).await?;
    let directory = Scratch::new("drafts")?;
    let process = || {
        let mut process = Command::new(&arguments[0]);
        process.arg(party.url("")).arg(directory.path());
        process
    };

    println!("a process that is killed when the draft is made:");
    party.expect([Accident::AnswerStuck]);
    party.crash(&mut process()).await?;

    println!("another one, killed when the invoice is sent:");
    party.expect([Accident::None, Accident::AnswerStuck]);
    party.crash(&mut process()).await?;

    println!("and one that lives:");
    assert!(process().status().await?.success());

    let invoices = invoices.lock().unwrap_or_else(PoisonError::into_inner);
    let sent = invoices.iter().filter(|is_sent| **is_sent).count();
    println!("{} drafts, of which {sent} was sent", invoices.len());
    assert_eq!(
        (invoices.len(), sent),
        (2, 1),
        "one invoice, and the draft that was lost with its process"
    );
    Ok(())
}
