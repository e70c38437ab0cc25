//! Webhooks that are verified, handled once, and answered alike: the sender and the receiver in one program.
//!
//! `cargo run --features axum,reqwest,webhooks --example webhooks` sends a webhook, sends it again, three times at once, forged, and six
//! minutes late. It ends with an error if the receiver handled anything but the first one.

use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::routing::post;
use axum::Router;
use data_encoding::BASE64;
use futures::future::join_all;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::net::TcpListener;
use tower::ServiceBuilder;
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
    /// Signs as Standard Webhooks says, and sends.
    async fn send(&self, id: &str, body: &'static str, at: SystemTime, secret: &str) -> Result<String, Box<dyn Error>> {
        let seconds = at.duration_since(UNIX_EPOCH)?.as_secs();
        let secret = BASE64.decode(secret.trim_start_matches("whsec_").as_bytes())?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret)?;
        mac.update(format!("{id}.{seconds}.{body}").as_bytes());
        let signature = BASE64.encode(&mac.finalize().into_bytes());
        let request = self.http.post(&self.url).body(body);
        let request = request
            .header("webhook-id", id)
            .header("webhook-timestamp", seconds)
            .header("webhook-signature", format!("v1,{signature}"));
        let answer = request.send().await?;
        Ok(format!("{}: {}", answer.status(), answer.text().await?))
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
    let (sender, now) = (
        Sender {
            http: reqwest::Client::new(),
            url,
        },
        SystemTime::now(),
    );

    println!("the first    {}", sender.send("msg_1", "paid", now, SECRET).await?);
    println!("again        {}", sender.send("msg_1", "paid", now, SECRET).await?);
    for answer in join_all((0..3).map(|_| sender.send("msg_2", "shipped", now, SECRET))).await {
        println!("three at once {}", answer?);
    }
    let forged = sender
        .send("msg_3", "paid", now, "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
        .await?;
    println!("forged       {forged}");
    let late = now - Duration::from_secs(360);
    println!("late         {}", sender.send("msg_4", "paid", late, SECRET).await?);

    match handled.load(Ordering::SeqCst) {
        2 => Ok(()),
        other => Err(format!("{other} webhooks were handled, not 2").into()),
    }
}
