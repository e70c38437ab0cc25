//! What several processes over one store must live through, whatever the store.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use futures::future::join_all;
use futures::{stream, StreamExt};

use super::cluster::{effects, http_client, send, End, Got, Mode, Process, Seen, LEASE};
use crate::support;

/// A ledger of one test's own, in the folder for temporary files.
fn ledger() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!(
        "ledger-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    std::env::temp_dir().join(name)
}

/// 10,000 requests over 1,000 keys, each key sent to all processes at once.
pub async fn shared_keys(store: &str, processes: usize) {
    // Nobody is lost here: a machine so busy that nothing is renewed for a second would make it look so.
    const LONG: Duration = Duration::from_secs(60);
    let ledger = ledger();
    let processes: Vec<Process> = (0..processes)
        .map(|_| Process::with_lease(LONG, store, Mode::Refuse, &ledger))
        .collect();
    let client = http_client();
    let key = |n: usize| {
        let (client, processes) = (&client, &processes);
        async move {
            let key = format!("key-{n}");
            let sends = (0..10).map(|turn| send(client, processes[(n + turn) % processes.len()].address, &key, &[]));
            let answers = join_all(sends).await.into_iter().map(|got| got.expect("an answer"));
            let bodies: HashSet<_> = answers
                .map(|got| {
                    assert_eq!(got.status, StatusCode::CREATED, "{got:?}");
                    got.body
                })
                .collect();
            assert_eq!(bodies.len(), 1, "{bodies:?}");
        }
    };
    stream::iter(0..1_000).for_each_concurrent(16, key).await;
    let effects = effects(&ledger);
    assert_eq!(effects.len(), 1_000);
    assert!(effects.values().all(|count| *count == 1), "{effects:?}");
    drop(std::fs::remove_file(ledger));
}

/// How many processes a test kills: the number in `KILLS`, or 200 if the tests are thorough, or 20.
fn wanted_kills() -> usize {
    let unset = if support::is_thorough() { 200 } else { 20 };
    std::env::var("KILLS").map_or(unset, |kills| kills.parse().expect("KILLS is a number"))
}

/// How many processes are killed in this mode, and how long after the last kill the next follows, in milliseconds.
fn pace(mode: Mode) -> (usize, std::ops::Range<u64>) {
    match mode {
        // Executions that take longer than a lease must have the time to end.
        Mode::FullPool => (wanted_kills().div_ceil(10), 1_000..2_000),
        Mode::Execute | Mode::Refuse | Mode::Transaction => (wanted_kills(), 20..120),
    }
}

/// Clients retry while processes are killed at random. Says how many keys there were.
pub async fn kills(store: &str, mode: Mode) -> usize {
    const PROCESSES: usize = 3;
    let ledger = ledger();
    let start = || Process::start(store, mode, &ledger);
    let processes: Vec<Process> = (0..PROCESSES).map(|_| start()).collect();
    let addresses: Arc<Mutex<Vec<SocketAddr>>> = Arc::new(Mutex::new(processes.iter().map(|p| p.address).collect()));
    let processes = Arc::new(Mutex::new(processes));
    let (seen, done) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
    let next = Arc::new(AtomicUsize::new(0));
    let clients = (0..24).map(|_| {
        let (seen, done, next) = (Arc::clone(&seen), Arc::clone(&done), Arc::clone(&next));
        let addresses = Arc::clone(&addresses);
        tokio::spawn(async move {
            let client = http_client();
            let addresses = || addresses.lock().unwrap().clone();
            while !done.load(Ordering::Relaxed) {
                let key = format!("key-{}", next.fetch_add(1, Ordering::Relaxed));
                // Two callers with one key, and one that asks again afterwards.
                let (one, two) = (
                    seen.settle(&client, addresses, &key),
                    seen.settle(&client, addresses, &key),
                );
                futures::join!(one, two);
                seen.settle(&client, addresses, &key).await;
            }
        })
    });
    let clients: Vec<_> = clients.collect();
    let killing = {
        let (ledger, store, addresses) = (ledger.clone(), store.to_owned(), Arc::clone(&addresses));
        let processes = Arc::clone(&processes);
        tokio::task::spawn_blocking(move || {
            let (kills, pause) = pace(mode);
            for kill in 0..kills {
                std::thread::sleep(Duration::from_millis(rand::random_range(pause.clone())));
                let at = kill % PROCESSES;
                processes.lock().unwrap()[at].kill();
                let process = Process::start(&store, mode, &ledger);
                addresses.lock().unwrap()[at] = process.address;
                processes.lock().unwrap()[at] = process;
            }
        })
    };
    killing.await.unwrap();
    done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let keys = next.load(Ordering::Relaxed);
    judge(&seen, mode, &effects(&ledger), keys);
    drop(std::fs::remove_file(ledger));
    keys
}

fn judge(seen: &Seen, mode: Mode, effects: &std::collections::BTreeMap<String, usize>, keys: usize) {
    let ends = seen.ends.lock().unwrap();
    let broken = seen.broken.lock().unwrap();
    let (mut unknown, mut takeovers, mut healed) = (0, 0, 0);
    assert_eq!(ends.len(), keys);
    for (key, ends) in ends.iter() {
        let answers = ends.iter().filter_map(|end| match end {
            End::Responded(got) => Some(got),
            End::Unknown => None,
        });
        let bodies: HashSet<_> = answers.clone().map(|got| &got.body).collect();
        assert!(bodies.len() <= 1, "{key} has several answers: {ends:?}");
        if answers.clone().any(|got| got.attempt() > 1) {
            takeovers += 1;
        }
        let unknowns = ends.iter().filter(|end| matches!(end, End::Unknown)).count();
        if unknowns > 0 {
            unknown += 1;
            healed += usize::from(answers.count() > 0);
            assert_eq!(mode, Mode::Refuse, "{key}: {ends:?}");
            assert!(
                broken.contains_key(key),
                "nothing explains why the outcome of {key} is unknown"
            );
        }
        let effects = effects.get(key).copied().unwrap_or(0);
        match mode {
            Mode::Refuse => assert!(effects <= 1, "{key} took effect {effects} times"),
            Mode::Execute | Mode::FullPool => assert!(
                effects >= 1 && (effects == 1 || broken.contains_key(key)),
                "{key}: {effects}"
            ),
            Mode::Transaction => assert_eq!(effects, 0),
        }
    }
    let repeated = effects.values().filter(|count| **count > 1).count();
    println!(
        "{mode:?}: {keys} keys, {} broken connections, {unknown} unknown ({healed} of them answered to others or later), \
         {takeovers} takeovers, {repeated} effects repeated, {} failed, refused {:?}",
        broken.values().sum::<usize>(),
        seen.failed.load(Ordering::Relaxed),
        seen.refused.lock().unwrap(),
    );
    assert!(!broken.is_empty(), "no kill met a request");
    match mode {
        Mode::Refuse => assert!(unknown > 0, "no kill met an execution"),
        Mode::Execute | Mode::FullPool | Mode::Transaction => assert!(takeovers > 0, "nothing was taken over"),
    }
}

/// What became of keys whose process was stopped past their leases and went on.
struct Stopped {
    /// What the callers of the stopped process got.
    late: Vec<Got>,
    /// What others got meanwhile, from another process.
    meanwhile: Vec<Got>,
    /// What was given afterwards, by the process that had been stopped.
    afterwards: Vec<Got>,
}

async fn stop_past_the_leases(store: &str, mode: Mode) -> Stopped {
    const KEYS: usize = 100;
    let ledger = ledger();
    let [stopped, other] = [(), ()].map(|()| Process::start(store, mode, &ledger));
    let client = http_client();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("key-{n}")).collect();
    // Long enough that every execution has begun when the process is stopped, and ends after it goes on, also on a machine
    // that is busy for a second.
    let slow = [("x-before", "3000".to_owned())];
    let quick = [("x-before", "0".to_owned()), ("x-after", "0".to_owned())];
    let (slow, quick) = (&slow, &quick);
    let to = |process: &Process, headers| {
        let sends = keys.iter().map(|key| send(&client, process.address, key, headers));
        let answers = join_all(sends.collect::<Vec<_>>());
        async {
            answers
                .await
                .into_iter()
                .map(|got| got.expect("an answer"))
                .collect::<Vec<Got>>()
        }
    };
    let elsewhere = async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        stopped.signal("-STOP");
        tokio::time::sleep(2 * LEASE).await;
        let answers = to(&other, &quick[..]).await;
        stopped.signal("-CONT");
        answers
    };
    let (late, meanwhile) = futures::join!(to(&stopped, &slow[..]), elsewhere);
    let afterwards = to(&stopped, &slow[..]).await;
    drop(std::fs::remove_file(ledger));
    Stopped {
        late,
        meanwhile,
        afterwards,
    }
}

/// Its keys are taken over and completed elsewhere: it changes nothing, and its callers get the winners' bytes.
pub async fn zombies(store: &str) {
    let Stopped {
        late,
        meanwhile,
        afterwards,
    } = stop_past_the_leases(store, Mode::Execute).await;
    for ((late, winner), again) in late.iter().zip(&meanwhile).zip(&afterwards) {
        assert_eq!((winner.status, winner.attempt()), (StatusCode::CREATED, 2));
        assert_eq!((late.status, &late.body), (winner.status, &winner.body));
        assert_eq!((again.is_replay(), &again.body), (true, &winner.body));
    }
    println!("{} owners were superseded", late.len());
}

/// Nobody may run its keys again, and their outcome is unknown until it completes late.
pub async fn late_completions(store: &str) {
    let Stopped {
        late,
        meanwhile,
        afterwards,
    } = stop_past_the_leases(store, Mode::Refuse).await;
    for ((late, unknown), again) in late.iter().zip(&meanwhile).zip(&afterwards) {
        assert_eq!(unknown.code().as_deref(), Some("outcome-unknown"), "{unknown:?}");
        assert_eq!((late.status, late.attempt()), (StatusCode::CREATED, 1), "{late:?}");
        assert_eq!((again.is_replay(), &again.body), (true, &late.body));
    }
    println!("{} completions came late", late.len());
}
