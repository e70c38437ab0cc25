//! A server with the API of SQS, a store and consumers, in five scenarios that run at the same time.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p sqs`

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use harness::{Folder, Ledger, Outcome, Process, RedisServer};
use sqs::{Error, Moto, Queue, Settings, WINDOW, client, consume};

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
    let (moto, redis) = (Moto::start()?, RedisServer::start());
    let servers = Servers {
        program,
        server: moto.url(),
        store: redis.url(),
        folder: Folder::new("sqs"),
    };
    let results = tokio::try_join!(
        servers.slow("slow-1", true),
        servers.slow("slow-2", false),
        servers.window(),
        servers.lost(),
        servers.poison(),
    )?;
    let is_as_promised = results == (true, true, true, true, true);
    if !is_as_promised {
        eprintln!("the outcome is not as promised");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// The servers that all scenarios share.
struct Servers {
    program: String,
    server: String,
    store: String,
    folder: Folder,
}

/// A scenario: a queue with its queue of dead letters, and its ledgers.
struct Scenario<'s> {
    servers: &'s Servers,
    queue: Queue,
    dead: Queue,
    effects: Ledger,
    deliveries: Ledger,
}

impl Servers {
    async fn scenario(&self, name: &str, visibility: Duration) -> Result<Scenario<'_>, Error> {
        let client = client(&self.server);
        let dead = Queue::create(&client, &format!("dead-{name}"), visibility, None).await?;
        Ok(Scenario {
            servers: self,
            queue: Queue::create(&client, name, visibility, Some(&dead)).await?,
            dead,
            effects: self.folder.ledger(&format!("{name}-effects")),
            deliveries: self.folder.ledger(&format!("{name}-deliveries")),
        })
    }

    /// The handler takes 5 s, and the visibility timeout is 3 s.
    async fn slow(&self, name: &str, extends: bool) -> Result<bool, Error> {
        let scenario = self.scenario(name, Duration::from_secs(3)).await?;
        scenario.queue.send(name).await?;
        let settings = Settings {
            extends,
            visibility: Duration::from_secs(3),
            ..scenario.settings()
        };
        let consumers = [scenario.start(&settings), scenario.start(&settings)];
        scenario.queue.until_empty().await?;
        drop(consumers);
        let (came, in_flight) = (
            scenario.deliveries.count("came"),
            scenario.deliveries.count("in-flight"),
        );
        println!(
            "a handler that takes longer than the visibility timeout, {}: {came} deliveries, {in_flight} of them refused as in \
             flight; {} effect",
            if extends {
                "which the consumer extends"
            } else {
                "which nobody extends"
            },
            scenario.effects.lines().len()
        );
        Ok(scenario.is_as_promised([name]).await? && (came == 1) == extends)
    }

    /// A FIFO queue removes copies of a message, but only within its deduplication window.
    async fn window(&self) -> Result<bool, Error> {
        let scenario = self.scenario("orders.fifo", Duration::from_secs(30)).await?;
        scenario.queue.send("order-1").await?;
        scenario.queue.send("order-1").await?;
        let within = scenario.queue.length().await?;
        tokio::time::sleep(WINDOW + Duration::from_millis(500)).await;
        scenario.queue.send("order-1").await?;
        let after = scenario.queue.length().await?;
        let consumer = scenario.start(&scenario.settings());
        scenario.queue.until_empty().await?;
        drop(consumer);
        println!(
            "a FIFO queue has {within} message after a message was sent twice, and {after} after another copy was sent after \
             the window of {} s: {} effect, {} duplicate",
            WINDOW.as_secs(),
            scenario.effects.lines().len(),
            scenario.deliveries.count("duplicate")
        );
        Ok(scenario.is_as_promised(["order-1"]).await?
            && (within, after, scenario.deliveries.count("duplicate")) == (1, 2, 1))
    }

    /// The consumer loses every other deletion.
    async fn lost(&self) -> Result<bool, Error> {
        let scenario = self.scenario("lost", Duration::from_secs(1)).await?;
        let names: Vec<String> = (1..=10).map(|number| format!("order-{number}")).collect();
        for name in &names {
            scenario.queue.send(name).await?;
        }
        let consumer = scenario.start(&Settings {
            lose_every: 2,
            ..scenario.settings()
        });
        scenario.queue.until_empty().await?;
        drop(consumer);
        println!(
            "10 messages, and every other deletion is lost: {} duplicates, {} effects",
            scenario.deliveries.count("duplicate"),
            scenario.effects.lines().len()
        );
        let names = names.iter().map(String::as_str);
        Ok(scenario.is_as_promised(names).await? && scenario.deliveries.count("duplicate") > 0)
    }

    /// One message of a batch fails.
    async fn poison(&self) -> Result<bool, Error> {
        let scenario = self.scenario("poisoned", Duration::from_secs(5)).await?;
        let mut names: Vec<String> = (1..=9).map(|number| format!("invoice-{number}")).collect();
        names.insert(4, "poison".to_owned());
        for name in &names {
            scenario.queue.send(name).await?;
        }
        let consumer = scenario.start(&scenario.settings());
        scenario.queue.until_empty().await?;
        drop(consumer);
        let (failed, dead) = (scenario.deliveries.count("failed"), scenario.dead.length().await?);
        println!(
            "a batch of 10 messages with one that always fails: {} effects, {failed} failures, {dead} dead letter",
            scenario.effects.lines().len()
        );
        let names = names.iter().map(String::as_str);
        Ok((failed, dead) == (5, 1) && scenario.effects.lines().len() == 9 && scenario.is_as_promised(names).await?)
    }
}

impl Scenario<'_> {
    fn settings(&self) -> Settings {
        Settings {
            server: self.servers.server.clone(),
            queue: self.queue.url.clone(),
            dead: self.dead.url.clone(),
            store: self.servers.store.clone(),
            effects: self.effects.path().to_owned(),
            deliveries: self.deliveries.path().to_owned(),
            visibility: Duration::from_secs(2),
            extends: true,
            lease: Duration::from_secs(2),
            lose_every: 0,
        }
    }

    fn start(&self, settings: &Settings) -> Process {
        Process::start(&mut settings.command(&self.servers.program))
    }

    async fn is_as_promised<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Result<bool, Error> {
        let effects: BTreeMap<String, usize> = self.effects.tally();
        let dead = self.dead.drain().await?;
        let outcome = Outcome::of(names.into_iter().map(str::to_owned), &effects, &dead);
        if !outcome.is_as_promised() {
            eprintln!("{outcome:?}");
        }
        Ok(outcome.is_as_promised())
    }
}
