//! Scenarios with several processes over one store, for any store.
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
use futures::{StreamExt, stream};

use super::cluster::{End, Got, LEASE, Mode, Process, Seen, effects, http_client, send};
use crate::support::settings;

/// The path of a ledger for one test, in the folder for temporary files.
pub fn ledger() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!(
        "ledger-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    std::env::temp_dir().join(name)
}

/// Sends 10,000 requests over 1,000 keys, each key to all processes at once.
pub async fn shared_keys(store: &str, processes: usize) {
    // No process dies here. On a machine so busy that no task renews for a second, a shorter lease
    // would end.
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
            let responses = join_all(sends).await.into_iter().map(|got| got.expect("a response"));
            let bodies: HashSet<_> = responses
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

/// The number of processes that a test kills: the value of `KILLS`, or 200 if the tests are
/// thorough, or 20.
fn wanted_kills() -> usize {
    let unset = if settings::is_thorough() { 200 } else { 20 };
    settings::number("KILLS", 1).map_or(unset, |kills| usize::try_from(kills).unwrap())
}

/// The number of kills in this mode, and the pause between two of them in milliseconds.
fn pace(mode: Mode) -> (usize, std::ops::Range<u64>) {
    match mode {
        // Executions that take longer than a lease need time to end.
        Mode::FullPool => (wanted_kills().div_ceil(10), 1_000..2_000),
        Mode::Execute | Mode::Refuse | Mode::Transaction => (wanted_kills(), 20..120),
    }
}

/// Clients retry while processes are killed at random. Returns the number of keys.
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
                // Two callers use one key at the same time, and a third one uses it afterwards.
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
        let responses = ends.iter().filter_map(|end| match end {
            End::Responded(got) => Some(got),
            End::Unknown => None,
        });
        let bodies: HashSet<_> = responses.clone().map(|got| &got.body).collect();
        assert!(bodies.len() <= 1, "{key} has several responses: {ends:?}");
        if responses.clone().any(|got| got.attempt() > 1) {
            takeovers += 1;
        }
        let unknowns = ends.iter().filter(|end| matches!(end, End::Unknown)).count();
        if unknowns > 0 {
            unknown += 1;
            healed += usize::from(responses.count() > 0);
            assert_eq!(mode, Mode::Refuse, "{key}: {ends:?}");
            assert!(
                broken.contains_key(key),
                "the outcome of {key} is unknown although no connection broke"
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
        "{mode:?}: {keys} keys, {} broken connections, {unknown} unknown ({healed} of them completed later), \
         {takeovers} takeovers, {repeated} effects repeated, {} failed, refused {:?}",
        broken.values().sum::<usize>(),
        seen.failed.load(Ordering::Relaxed),
        seen.refused.lock().unwrap(),
    );
    assert!(!broken.is_empty(), "no kill interrupted a request");
    match mode {
        Mode::Refuse => assert!(unknown > 0, "no kill interrupted an execution"),
        Mode::Execute | Mode::FullPool | Mode::Transaction => assert!(takeovers > 0, "no process took a key over"),
    }
}

/// The responses for keys whose process was stopped past their leases and then continued.
struct Stopped {
    /// The responses to the callers of the stopped process.
    late: Vec<Got>,
    /// The responses of another process in the meantime.
    meanwhile: Vec<Got>,
    /// The responses of the stopped process after it continued.
    afterwards: Vec<Got>,
}

async fn stop_past_the_leases(store: &str, mode: Mode) -> Stopped {
    const KEYS: usize = 100;
    let ledger = ledger();
    let [stopped, other] = [(), ()].map(|()| Process::start(store, mode, &ledger));
    let client = http_client();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("key-{n}")).collect();
    // Long enough that every execution begins before the stop and ends after it, even if the
    // machine is busy for a second.
    let slow = [("x-before", "3000".to_owned())];
    let quick = [("x-before", "0".to_owned()), ("x-after", "0".to_owned())];
    let (slow, quick) = (&slow, &quick);
    let to = |process: &Process, headers| {
        let sends = keys.iter().map(|key| send(&client, process.address, key, headers));
        let responses = join_all(sends.collect::<Vec<_>>());
        async {
            responses
                .await
                .into_iter()
                .map(|got| got.expect("a response"))
                .collect::<Vec<Got>>()
        }
    };
    let elsewhere = async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        stopped.signal("-STOP");
        tokio::time::sleep(2 * LEASE).await;
        let responses = to(&other, &quick[..]).await;
        stopped.signal("-CONT");
        responses
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

/// Another process takes the keys over and completes them. The stopped process changes nothing, and
/// its callers get the bytes of the other process.
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

/// No process may run the keys again. Their outcome is unknown until the stopped process completes
/// late.
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
