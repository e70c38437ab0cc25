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

use super::cluster::{effects, http_client, send, End, Mode, Process, Seen, LEASE};

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
    let ledger = ledger();
    let processes: Vec<Process> = (0..processes)
        .map(|_| Process::start(store, Mode::Refuse, &ledger))
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

/// How many processes are killed: 200, or what `KILLS` says.
fn wanted_kills() -> usize {
    std::env::var("KILLS").map_or(200, |kills| kills.parse().expect("KILLS is a number"))
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
            for kill in 0..wanted_kills() {
                std::thread::sleep(Duration::from_millis(rand::random_range(20..120)));
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
            End::Answered(got) => Some(got),
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
            Mode::Execute => assert!(
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
        Mode::Execute | Mode::Transaction => assert!(takeovers > 0, "nothing was taken over"),
    }
}

/// A process is stopped past its leases, its keys are taken over and completed elsewhere, and it goes on.
pub async fn zombies(store: &str) {
    const KEYS: usize = 100;
    let ledger = ledger();
    let [zombie, other] = [(), ()].map(|()| Process::start(store, Mode::Execute, &ledger));
    let client = http_client();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("key-{n}")).collect();
    // Long enough that every execution is under way when the process is stopped, and ends after it goes on.
    let slow = [("x-before", "1000".to_owned())];
    let slow = &slow;
    let through_zombie = join_all(keys.iter().map(|key| send(&client, zombie.address, key, slow)));
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        zombie.signal("-STOP");
        tokio::time::sleep(2 * LEASE).await;
        let quick = [("x-before", "0".to_owned()), ("x-after", "0".to_owned())];
        let quick = &quick;
        let winners = join_all(keys.iter().map(|key| send(&client, other.address, key, quick))).await;
        zombie.signal("-CONT");
        winners
    };
    let (late, winners) = futures::join!(through_zombie, meanwhile);
    for (late, winner) in late.into_iter().zip(winners) {
        let (late, winner) = (late.expect("the zombie answers"), winner.expect("the winner answers"));
        assert_eq!((winner.status, winner.attempt()), (StatusCode::CREATED, 2));
        assert_eq!(late.body, winner.body);
        assert_eq!(late.status, winner.status);
    }
    let again = join_all(keys.iter().map(|key| send(&client, zombie.address, key, slow))).await;
    assert!(again
        .into_iter()
        .all(|got| got.is_some_and(|got| got.is_replay() && got.attempt() == 2)));
    drop(std::fs::remove_file(ledger));
}
