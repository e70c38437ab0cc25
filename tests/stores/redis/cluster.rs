//! A Cluster of three nodes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use redis::cluster::ClusterClientBuilder;
use tower::Layer;
use tower_idempotency::protocol::{Claim, Completion, Decision, StorageKey};
use tower_idempotency::{Error, ErrorKind, Idempotency, IdempotencyLayer, RedisStore, Store};

use super::{HOUR, RedisServer, claim, granted, stored};
use crate::support::{Got, Handler, post, send};

/// Three nodes, each with a third of the slots.
pub(super) struct Cluster([RedisServer; 3]);

impl Cluster {
    pub(super) fn start() -> Self {
        let nodes = [(0, 5_460), (5_461, 10_922), (10_923, 16_383)].map(|(first, last)| {
            let node = RedisServer::with(&["--cluster-enabled", "yes"]);
            node.command::<()>(&format!("CLUSTER ADDSLOTSRANGE {first} {last}"));
            node
        });
        for node in &nodes[1..] {
            nodes[0].command::<()>(&format!("CLUSTER MEET 127.0.0.1 {}", node.port()));
        }
        // A node is ready only when it knows an owner for every slot.
        nodes.iter().for_each(RedisServer::wait_for_cluster);
        Self(nodes)
    }

    async fn store(&self, prefix: &str) -> RedisStore {
        self.connect(prefix).await.unwrap()
    }

    async fn connect(&self, prefix: &str) -> Result<RedisStore, Error> {
        let client = ClusterClientBuilder::new(self.0.iter().map(RedisServer::url)).retries(0);
        let client = client.build().unwrap();
        let connection = client.get_async_connection().await.unwrap();
        let builder = RedisStore::builder().with_prefix(prefix);
        builder.use_cluster(connection).await
    }

    pub(super) fn urls(&self) -> [String; 3] {
        [0, 1, 2].map(|at| self.0[at].url())
    }

    /// Runs a command on each node.
    pub(super) fn command(&self, words: &str) {
        self.0.iter().for_each(|node| node.command(words));
    }

    /// How many keys each node has.
    fn sizes(&self) -> [usize; 3] {
        [0, 1, 2].map(|at| self.0[at].command("DBSIZE"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_lie_on_all_nodes_of_a_cluster_one_key_each() {
    const KEYS: u16 = 300;
    let cluster = Cluster::start();
    let store = cluster.store("idempotency:").await;
    for number in 0..KEYS {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        let first = Claim {
            key: StorageKey::from_bytes(key),
            ..claim(0, 1)
        };
        let owner = granted(&store, &first).await.owner;
        let second = Claim {
            nonce: claim(0, 2).nonce,
            ..first.clone()
        };
        assert!(matches!(store.claim(&second).await, Ok(Decision::Wait { .. })));
        let completion = store.complete(&first.key, owner, &stored("paid"), HOUR).await;
        assert_eq!(completion.unwrap(), Completion::Completed);
        assert!(matches!(store.claim(&second).await, Ok(Decision::Replay(response)) if response.body == "paid"));
    }
    let sizes = cluster.sizes();
    assert_eq!(sizes.iter().sum::<usize>(), usize::from(KEYS), "{sizes:?}");
    assert!(sizes.iter().all(|size| *size > 0), "{sizes:?}");
}

/// Moves a slot from one node to another, as `redis-cli --cluster reshard` does.
struct Move<'c> {
    cluster: &'c Cluster,
    slot: u16,
    from: &'c RedisServer,
    to: &'c RedisServer,
}

impl<'c> Move<'c> {
    fn of(cluster: &'c Cluster, tag: &str) -> Self {
        let slot: u16 = cluster.0[0].command(&format!("CLUSTER KEYSLOT {tag}"));
        let at = usize::from(slot > 5_460) + usize::from(slot > 10_922);
        Self {
            cluster,
            slot,
            from: &cluster.0[at],
            to: &cluster.0[(at + 1) % 3],
        }
    }

    /// From here on, the old node redirects a client that asks for a key that it lacks (ASK).
    fn begin(&self) {
        let [from, to] = [self.from, self.to].map(|node| node.command::<String>("CLUSTER MYID"));
        self.to
            .command::<()>(&format!("CLUSTER SETSLOT {} IMPORTING {from}", self.slot));
        self.from
            .command::<()>(&format!("CLUSTER SETSLOT {} MIGRATING {to}", self.slot));
    }

    /// Moves some keys, and returns their number.
    fn some_keys(&self) -> usize {
        let keys: Vec<String> = self.from.command(&format!("CLUSTER GETKEYSINSLOT {} 5", self.slot));
        if !keys.is_empty() {
            let mut migrate = redis::cmd("MIGRATE");
            migrate.arg("127.0.0.1").arg(self.to.port()).arg("").arg(0).arg(10_000);
            self.from.run::<()>(migrate.arg("KEYS").arg(&keys));
        }
        keys.len()
    }

    /// From here on, the old node names the new owner of the slot (MOVED).
    fn end(&self) {
        let to = self.to.command::<String>("CLUSTER MYID");
        let others = self.cluster.0.iter().filter(|node| node.port() != self.to.port());
        for node in std::iter::once(self.to).chain(others) {
            node.command::<()>(&format!("CLUSTER SETSLOT {} NODE {to}", self.slot));
        }
    }
}

type Service = Idempotency<Handler, RedisStore>;

/// Repeats a request until the response is final.
async fn settled(service: &Service, key: &str) -> Got {
    loop {
        let got = send(service, post(key, "pay")).await;
        if got.status() == 201 {
            return got;
        }
        assert!(matches!(got.status(), 409 | 503), "{key}: {got:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_runs_twice_while_a_slot_moves_to_another_node() {
    const CALLERS: usize = 16;
    let cluster = Arc::new(Cluster::start());
    let handler = Handler::new().taking(Duration::from_millis(5));
    // All keys are in one slot.
    let mut services = Vec::new();
    for _ in 0..2 {
        let layer = IdempotencyLayer::new(cluster.store("{one}:").await);
        services.push(layer.layer(handler.clone()));
    }
    let (settling, is_moved) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let callers = (0..CALLERS).map(|caller| {
        let (services, settling, is_moved) = (services.clone(), Arc::clone(&settling), Arc::clone(&is_moved));
        tokio::spawn(async move {
            for number in 0.. {
                if is_moved.load(Ordering::SeqCst) {
                    return number;
                }
                let key = format!("{caller}-{number}");
                // Both processes get the request at the same time, and then once more.
                let sends = join_all(services.iter().map(|service| settled(service, &key))).await;
                let again = settled(&services[number % 2], &key).await;
                assert_eq!((&sends[0].body, &again.body), (&sends[1].body, &sends[0].body));
                assert!(again.is_replay());
                settling.fetch_add(1, Ordering::SeqCst);
            }
            unreachable!()
        })
    });
    let callers: Vec<_> = callers.collect();
    let moving = {
        let (cluster, settling) = (Arc::clone(&cluster), Arc::clone(&settling));
        // More than are in flight, so that new requests begin and end.
        let others_go_on = move || {
            let begun = settling.load(Ordering::SeqCst);
            for _ in 0..12_000 {
                if settling.load(Ordering::SeqCst) >= begun + 2 * CALLERS {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            panic!("hardly any request has ended for a minute");
        };
        tokio::task::spawn_blocking(move || {
            others_go_on();
            let moving = Move::of(&cluster, "one");
            moving.begin();
            moving.some_keys();
            others_go_on();
            while moving.some_keys() > 0 {}
            others_go_on();
            moving.end();
            others_go_on();
        })
    };
    moving.await.unwrap();
    is_moved.store(true, Ordering::SeqCst);
    let keys: usize = join_all(callers).await.into_iter().map(Result::unwrap).sum();
    assert_eq!((handler.runs(), handler.finished()), (keys, keys));
    let moved = Move::of(&cluster, "one");
    let redirections: String = moved.from.command("INFO errorstats");
    for redirection in ["errorstat_ASK", "errorstat_MOVED"] {
        assert!(redirections.contains(redirection), "{redirections}");
    }
    assert_eq!(cluster.sizes().iter().sum::<usize>(), keys);
    assert_eq!(moved.to.command::<usize>("DBSIZE"), keys);
}

/// The repeated check of the servers asked every node, so one dead node made the keys of all others
/// unavailable.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_node_takes_only_its_own_keys_with_it() {
    const KEYS: u16 = 24;
    let claim_of = |number: u16| {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        Claim {
            key: StorageKey::from_bytes(key),
            ..claim(0, 1)
        }
    };
    for dead in 0..3 {
        let mut cluster = Cluster::start();
        cluster.command("CONFIG SET cluster-require-full-coverage no");
        let store = cluster.store("idempotency:").await;
        cluster.0[dead].kill();
        let mut granted = 0;
        for number in (0..KEYS).chain(0..KEYS) {
            granted += usize::from(store.claim(&claim_of(number)).await.is_ok());
        }
        assert!(
            granted > usize::from(KEYS),
            "node {dead} is dead: the store granted {granted} of {KEYS} claims, each made twice"
        );
    }
}

/// Each node has settings of its own, and evicts its own records.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_with_one_node_that_may_evict_is_refused() {
    let cluster = Cluster::start();
    for node in &cluster.0 {
        node.command::<()>("CONFIG SET maxmemory-policy allkeys-lru");
        node.command::<()>("CONFIG SET maxmemory 100mb");
        let error = cluster.connect("idempotency:").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(error.to_string().contains("maxmemory-policy"), "{error}");
        node.command::<()>("CONFIG SET maxmemory 0");
    }
    drop(cluster.store("idempotency:").await);
}
