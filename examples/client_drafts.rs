//! One invoice at a third party that has drafts. A job of two steps is killed in each step and
//! resumed.
//!
//! ```text
//! cargo run --features axum,once,reqwest --example client_drafts
//! ```
//!
//! A draft has no effect, so the job may make another one if the first is lost. The third party
//! sends the same draft only once, so the job may repeat that step, too. But the *second* step must
//! not forget which draft to send. Therefore the first step's result is recorded in a store that
//! survives the process. Here it is the store of the example `custom_store`; use Redis or
//! PostgreSQL in production.
//!
//! The job runs in a process of its own. The example kills this process after the third party made
//! the draft but before it responded, and again after it sent the invoice but before it responded.
//! At the end one invoice was sent. The draft that was lost with its process stays unsent.

#[expect(
    dead_code,
    unreachable_pub,
    reason = "this example needs only the store of the other one"
)]
mod custom_store;
mod third_party;

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path as Segment, State};
use axum::http::StatusCode;
use axum::routing::{post, put};
use custom_store::DirectoryStore;
use third_party::{Accident, Scratch, ThirdParty};
use tokio::process::Command;
use tower_idempotency::Clock;
use tower_idempotency::client::{Attempt, Failure, once};

/// The invoices at the third party: for each draft, whether it was sent.
type Invoices = Arc<Mutex<Vec<bool>>>;

async fn draft(State(invoices): State<Invoices>) -> (StatusCode, String) {
    let mut invoices = invoices.lock().unwrap_or_else(PoisonError::into_inner);
    invoices.push(false);
    (StatusCode::CREATED, (invoices.len() - 1).to_string())
}

/// Sends a draft. The operation is idempotent by nature, because a draft that was sent stays sent.
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

/// The job: makes a draft and sends it.
async fn invoice(store: DirectoryStore, party: &str) -> Result<(), Box<dyn Error>> {
    // Another process takes over one second after the last renewal of the lease. Default: 30 s.
    let job = once(store, "order-4711")
        .with_lease(Duration::from_secs(1))
        .at_least_once();
    let mut steps = job.steps();

    let url = format!("{party}/invoices");
    let draft = steps.step("draft").run(|attempt| make_draft(attempt, url)).await?;
    println!("  the draft is {}", draft.value());

    let url = format!("{party}/invoices/{}/sent", draft.value());
    steps.step("send").run(|attempt| send_draft(attempt, url)).await?;
    println!("  the draft is sent");
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

    println!("a process that is killed after the draft was made:");
    party.expect([Accident::ResponseStuck]);
    party.crash(&mut process()).await?;

    println!("a process that is killed after the invoice was sent:");
    party.expect([Accident::None, Accident::ResponseStuck]);
    party.crash(&mut process()).await?;

    println!("a process that is not killed:");
    assert!(process().status().await?.success());

    let invoices = invoices.lock().unwrap_or_else(PoisonError::into_inner);
    let sent = invoices.iter().filter(|is_sent| **is_sent).count();
    println!("{} drafts, and {sent} of them was sent", invoices.len());
    assert_eq!(
        (invoices.len(), sent),
        (2, 1),
        "one sent invoice, and one draft that was lost with its process"
    );
    Ok(())
}
