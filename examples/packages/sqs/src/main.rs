//! `cargo run --manifest-path examples/packages/Cargo.toml -p sqs`: a server that speaks SQS, a store, and consumers, in five acts at once.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use harness::{Folder, Ledger, Outcome, Process, RedisServer};
use sqs::{client, consume, Error, Moto, Queue, Settings, WINDOW};

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let mut arguments = std::env::args();
    let program = arguments.next().ok_or("a program has a name")?;
    if arguments.next().as_deref() == Some("consume") {
        let settings = Settings::from_arguments(arguments).ok_or("the parent says what to consume")?;
        consume(settings).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let (moto, redis) = (Moto::start()?, RedisServer::start());
    let stage = Stage {
        program,
        server: moto.url(),
        store: redis.url(),
        folder: Folder::new("sqs"),
    };
    let acts = tokio::try_join!(
        stage.slow("slow-1", true),
        stage.slow("slow-2", false),
        stage.window(),
        stage.lost(),
        stage.poison(),
    )?;
    let is_as_promised = acts == (true, true, true, true, true);
    if !is_as_promised {
        eprintln!("that is not what was promised");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

struct Stage {
    program: String,
    server: String,
    store: String,
    folder: Folder,
}

/// A queue with its dead letters, and its ledgers.
struct Act<'s> {
    stage: &'s Stage,
    queue: Queue,
    dead: Queue,
    effects: Ledger,
    deliveries: Ledger,
}

impl Stage {
    async fn act(&self, name: &str, visibility: Duration) -> Result<Act<'_>, Error> {
        let client = client(&self.server);
        let dead = Queue::create(&client, &format!("dead-{name}"), visibility, None).await?;
        Ok(Act {
            stage: self,
            queue: Queue::create(&client, name, visibility, Some(&dead)).await?,
            dead,
            effects: self.folder.ledger(&format!("{name}-effects")),
            deliveries: self.folder.ledger(&format!("{name}-deliveries")),
        })
    }

    /// A handler of 5 s, and a visibility timeout of 3 s.
    async fn slow(&self, name: &str, extends: bool) -> Result<bool, Error> {
        let act = self.act(name, Duration::from_secs(3)).await?;
        act.queue.send(name).await?;
        let settings = Settings {
            extends,
            visibility: Duration::from_secs(3),
            ..act.settings()
        };
        let consumers = [act.start(&settings), act.start(&settings)];
        act.queue.until_empty().await?;
        drop(consumers);
        let (came, in_flight) = (act.deliveries.count("came"), act.deliveries.count("in-flight"));
        println!(
            "a handler slower than its message is invisible, {}: {came} deliveries, {in_flight} of them told that it is in flight; {} effect",
            if extends { "which is extended" } else { "which nobody extends" },
            act.effects.lines().len()
        );
        Ok(act.is_as_promised([name]).await? && (came == 1) == extends)
    }

    /// A FIFO queue removes copies, and forgets them.
    async fn window(&self) -> Result<bool, Error> {
        let act = self.act("orders.fifo", Duration::from_secs(30)).await?;
        act.queue.send("order-1").await?;
        act.queue.send("order-1").await?;
        let within = act.queue.length().await?;
        tokio::time::sleep(WINDOW + Duration::from_millis(500)).await;
        act.queue.send("order-1").await?;
        let after = act.queue.length().await?;
        let consumer = act.start(&act.settings());
        act.queue.until_empty().await?;
        drop(consumer);
        println!(
            "a FIFO queue with a message sent twice holds {within}; with another copy after its window of {} s, {after}: {} effect, {} \
             duplicate",
            WINDOW.as_secs(),
            act.effects.lines().len(),
            act.deliveries.count("duplicate")
        );
        Ok(act.is_as_promised(["order-1"]).await? && (within, after, act.deliveries.count("duplicate")) == (1, 2, 1))
    }

    /// Every other deletion gets lost.
    async fn lost(&self) -> Result<bool, Error> {
        let act = self.act("lost", Duration::from_secs(1)).await?;
        let names: Vec<String> = (1..=10).map(|number| format!("order-{number}")).collect();
        for name in &names {
            act.queue.send(name).await?;
        }
        let consumer = act.start(&Settings {
            lose_every: 2,
            ..act.settings()
        });
        act.queue.until_empty().await?;
        drop(consumer);
        println!(
            "10 messages, and every other acknowledgement is lost: {} duplicates, {} effects",
            act.deliveries.count("duplicate"),
            act.effects.lines().len()
        );
        let names = names.iter().map(String::as_str);
        Ok(act.is_as_promised(names).await? && act.deliveries.count("duplicate") > 0)
    }

    /// A batch of which one message fails.
    async fn poison(&self) -> Result<bool, Error> {
        let act = self.act("poisoned", Duration::from_secs(5)).await?;
        let mut names: Vec<String> = (1..=9).map(|number| format!("invoice-{number}")).collect();
        names.insert(4, "poison".to_owned());
        for name in &names {
            act.queue.send(name).await?;
        }
        let consumer = act.start(&act.settings());
        act.queue.until_empty().await?;
        drop(consumer);
        let (failed, dead) = (act.deliveries.count("failed"), act.dead.length().await?);
        println!(
            "a batch of 10 of which one fails: {} effects; that one failed {failed} times and is one of {dead} dead letters",
            act.effects.lines().len()
        );
        let names = names.iter().map(String::as_str);
        Ok((failed, dead) == (5, 1) && act.effects.lines().len() == 9 && act.is_as_promised(names).await?)
    }
}

impl Act<'_> {
    fn settings(&self) -> Settings {
        Settings {
            server: self.stage.server.clone(),
            queue: self.queue.url.clone(),
            dead: self.dead.url.clone(),
            store: self.stage.store.clone(),
            effects: self.effects.path().to_owned(),
            deliveries: self.deliveries.path().to_owned(),
            visibility: Duration::from_secs(2),
            extends: true,
            lease: Duration::from_secs(2),
            lose_every: 0,
        }
    }

    fn start(&self, settings: &Settings) -> Process {
        Process::start(&mut settings.command(&self.stage.program))
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
