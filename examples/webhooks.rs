//! Verified webhooks that are handled once. The sender and the receiver are in one program.
//!
//! ```text
//! cargo run --features axum,reqwest,testing,webhooks --example webhooks
//! ```
//!
//! The sender sends `msg_1` twice, `msg_2` three times at once, a forged webhook, and a webhook
//! that is six minutes late. The program ends with an error unless the receiver handled exactly two
//! webhooks.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::http::Request;
use axum::routing::post;
use futures::future::join_all;
use tokio::net::TcpListener;
use tower::ServiceBuilder;
use tower_idempotency::receiver::testing::WebhookSigner;
use tower_idempotency::receiver::webhooks::{StandardWebhooks, WebhookLayer};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn receiver(handled: &Arc<AtomicUsize>) -> Result<Router, tower_idempotency::Error> {
    let layers = ServiceBuilder::new()
        .layer(WebhookLayer::new("billing", StandardWebhooks::new([SECRET])?))
        .layer(IdempotencyLayer::new(MemoryStore::new()).webhooks());
    let handled = Arc::clone(handled);
    let handle = move |event: String| async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let number = handled.fetch_add(1, Ordering::SeqCst) + 1;
        format!("handled {event} as number {number}")
    };
    Ok(Router::new().route("/webhooks", post(handle)).layer(layers))
}

struct Sender {
    http: reqwest::Client,
    url: String,
}

impl Sender {
    /// Signs a webhook as the Standard Webhooks specification requires, and sends it.
    async fn send(&self, id: &str, body: &'static str, signer: &WebhookSigner) -> Result<String, Box<dyn Error>> {
        let request = Request::post(&self.url).header("webhook-id", id).body(body)?;
        let response = self.http.execute(signer.sign(request).try_into()?).await?;
        Ok(format!("{}: {}", response.status(), response.text().await?))
    }
}

#[tokio::main]
#[expect(clippy::disallowed_methods, reason = "webhooks carry the time of day")]
async fn main() -> Result<(), Box<dyn Error>> {
    let handled = Arc::new(AtomicUsize::new(0));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/webhooks", listener.local_addr()?);
    let router = receiver(&handled)?;
    tokio::spawn(async move { axum::serve(listener, router).await });
    let http = reqwest::Client::new();
    let sender = Sender { http, url };
    let signer = WebhookSigner::standard(SECRET);

    println!("the first    {}", sender.send("msg_1", "paid", &signer).await?);
    println!("again        {}", sender.send("msg_1", "paid", &signer).await?);
    for response in join_all((0..3).map(|_| sender.send("msg_2", "shipped", &signer))).await {
        println!("three at once {}", response?);
    }
    let forger = WebhookSigner::standard("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
    println!("forged       {}", sender.send("msg_3", "paid", &forger).await?);
    let late = signer.at(SystemTime::now() - Duration::from_secs(360));
    println!("late         {}", sender.send("msg_4", "paid", &late).await?);

    match handled.load(Ordering::SeqCst) {
        2 => Ok(()),
        other => Err(format!("{other} webhooks were handled, not 2").into()),
    }
}
