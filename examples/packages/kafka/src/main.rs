//! Brokers, a store and consumers: one consumer is killed, one replaces it, and one joins the
//! group.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p kafka`

use std::process::ExitCode;
use std::time::Duration;

use harness::{Folder, Outcome, Process, RedisServer};
use kafka::{Brokers, ORDERS, Order, Overview, Settings, consume, producer, send};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let mut arguments = std::env::args();
    let program = arguments
        .next()
        .ok_or("the first argument, the name of this program, is missing")?;
    if arguments.next().as_deref() == Some("consume") {
        let settings = Settings::from_arguments(arguments)
            .ok_or("arguments are missing or wrong; only the parent process starts consumers")?;
        consume(settings).await?;
        return Ok(ExitCode::SUCCESS);
    }
    run_scenarios(&program).await
}

async fn run_scenarios(program: &str) -> Result<ExitCode, Error> {
    let (brokers, redis, folder) = (Brokers::start()?, RedisServer::start(), Folder::new("kafka"));
    let (effects, deliveries) = (folder.ledger("effects"), folder.ledger("deliveries"));
    let settings = Settings {
        servers: brokers.servers(),
        group: "billing".to_owned(),
        store: redis.url(),
        effects: effects.path().to_owned(),
        deliveries: deliveries.path().to_owned(),
        commit_every: Duration::from_millis(200),
        lease: Duration::from_secs(2),
    };
    let producer = producer(&settings.servers)?;
    let overview = Overview::new(&settings);

    let mut sent: Vec<Order> = (1..=20).map(|number| Order::new(format!("order-{number}"))).collect();
    sent.push(Order::new("poison-1"));
    sent.push(Order::without_id("order-21"));
    send(&producer, &sent).await?;
    send(&producer, &sent[..10]).await?;
    println!("sent 22 messages, 10 of them twice; one message cannot be handled, and one has no id");

    let never = Settings {
        commit_every: Duration::from_secs(600),
        ..settings.clone()
    };
    let mut first = Process::start(&mut never.command(program));
    until(|| deliveries.count("first") + deliveries.count("duplicate") >= 31).await;
    first.kill();
    let (orders, came) = (overview.offsets(ORDERS)?, deliveries.count("came"));
    println!(
        "a consumer handled {} and was killed before it committed an offset: {}",
        deliveries.count("first"),
        in_words(&orders)
    );

    let before = deliveries.count("duplicate");
    let mut second = Process::start(&mut settings.command(program));
    overview.until_done().await?;
    println!(
        "the next consumer began at the same offsets: {} further deliveries, {} of them duplicates: {}",
        deliveries.count("came") - came,
        deliveries.count("duplicate") - before,
        in_words(&overview.offsets(ORDERS)?)
    );

    let slow: Vec<Order> = (1..=8).map(|number| Order::new(format!("slow-{number}"))).collect();
    let came = deliveries.count("came");
    send(&producer, &slow).await?;
    until(|| deliveries.count("came") >= came + 8).await;
    let third = Process::start(&mut settings.command(program));
    overview.until_done().await?;
    println!(
        "another consumer joined while the first one handled 8 slow messages; the brokers delivered some of them again, and \
         the receiver reported {} times that a message is in flight",
        deliveries.count("in-flight")
    );
    let both_run = second.is_up();
    drop((second, third));

    sent.extend(slow);
    let (names, mut dead) = (sent.into_iter().map(|order| order.name), overview.dead()?);
    dead.dedup();
    let outcome = Outcome::of(names, &effects.tally(), &dead);
    println!(
        "effects: {} messages had one effect each; dead letters: {dead:?}",
        outcome.once
    );
    let as_promised = both_run
        && orders.iter().all(|(at, _)| *at == 0)
        && outcome.is_as_promised()
        && (outcome.once, outcome.dead) == (29, 1);
    if !as_promised {
        eprintln!("the outcome is not as promised: {outcome:?}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(offsets: &[(i64, i64)]) -> String {
    let parts: Vec<String> = offsets.iter().map(|(at, end)| format!("{at} of {end}")).collect();
    format!("committed {}", parts.join(", "))
}

async fn until(mut is_true: impl FnMut() -> bool) {
    for _ in 0..600 {
        if is_true() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the next step of the scenario did not happen within 30 s");
}
