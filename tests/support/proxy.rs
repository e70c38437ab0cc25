//! A TCP proxy that breaks the connections through it, and the checks that the operations of a
//! store survive it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Release, Renewal, Resolution,
    ResolveResult, StorageKey, StoredResponse,
};
use tower_idempotency::{Error, ErrorKind, Store};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// The fate of all bytes from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The bytes pass.
    Pass,
    /// After this number of bytes in one direction, the proxy cuts every connection.
    CutAfter(Direction, usize),
    /// The bytes of one direction vanish.
    Swallow(Direction),
    /// The bytes of both directions vanish.
    SwallowAll,
    /// The bytes are delayed by this time.
    Delay(Duration),
}

#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    /// The server to which new connections lead.
    server: Mutex<SocketAddr>,
    fate: Mutex<Fate>,
    cut: Notify,
    /// Whether the proxy has cut a connection since the fate was set.
    was_cut: AtomicBool,
}

impl Proxy {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            server: Mutex::new(server),
            fate: Mutex::new(Fate::Pass),
            cut: Notify::new(),
            was_cut: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = *shared.server.lock().unwrap();
                let Ok(server) = TcpStream::connect(server).await else {
                    continue;
                };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                }
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, Direction::ToServer, Arc::clone(&shared)));
                tokio::spawn(pass(from_server, to_client, Direction::ToClient, Arc::clone(&shared)));
            }
        });
        Self { address, state }
    }

    pub fn set(&self, fate: Fate) {
        *self.state.fate.lock().unwrap() = fate;
        self.state.was_cut.store(false, Ordering::SeqCst);
    }

    /// Leads all new connections to another server, and cuts the present ones.
    pub fn lead_to(&self, server: SocketAddr) {
        *self.state.server.lock().unwrap() = server;
        self.state.cut.notify_waiters();
    }

    /// Whether the proxy has cut a connection since the fate was set.
    pub fn was_cut(&self) -> bool {
        self.state.was_cut.load(Ordering::SeqCst)
    }

    /// Lets everything pass again after each cut, until the future is dropped.
    pub async fn heal_for_new_connections(&self) -> Infallible {
        loop {
            let mut cut = std::pin::pin!(self.state.cut.notified());
            cut.as_mut().enable();
            if !self.was_cut() {
                cut.await;
            }
            self.heal();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Lets everything pass again, even on connections that have lost bytes.
    pub fn pass(&self) {
        *self.state.fate.lock().unwrap() = Fate::Pass;
    }

    /// Lets everything pass again and returns whether the proxy has cut a connection. TCP never
    /// omits bytes, so the proxy cuts every connection.
    pub fn heal(&self) -> bool {
        let fate = std::mem::replace(&mut *self.state.fate.lock().unwrap(), Fate::Pass);
        if matches!(fate, Fate::Swallow(_) | Fate::SwallowAll) {
            self.state.cut.notify_waiters();
        }
        matches!(fate, Fate::CutAfter(_, 0))
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, direction: Direction, state: Arc<State>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut cut = std::pin::pin!(state.cut.notified());
        cut.as_mut().enable();
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            () = cut => 0,
        };
        if read == 0 {
            return;
        }
        let (passing, cut, delay) = state.judge(direction, read);
        tokio::time::sleep(delay).await;
        if to.write_all(&buffer[..passing]).await.is_err() {
            return;
        }
        if cut {
            state.was_cut.store(true, Ordering::SeqCst);
            state.cut.notify_waiters();
            return;
        }
    }
}

impl State {
    /// Returns how many of these bytes pass, whether the proxy then cuts every connection, and the
    /// delay.
    fn judge(&self, direction: Direction, read: usize) -> (usize, bool, Duration) {
        let mut fate = self.fate.lock().unwrap();
        match &mut *fate {
            Fate::CutAfter(of, left) if *of == direction => {
                let passing = read.min(*left);
                *left -= passing;
                (passing, *left == 0, Duration::ZERO)
            }
            Fate::Swallow(of) if *of == direction => (0, false, Duration::ZERO),
            Fate::SwallowAll => (0, false, Duration::ZERO),
            Fate::Delay(delay) => (read, false, *delay),
            _ => (read, false, Duration::ZERO),
        }
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

fn fresh() -> Claim {
    Claim {
        key: StorageKey::from_bytes(rand::random()),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::random(),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Execute,
        max_attempts: 9,
    }
}

fn outcome() -> Outcome {
    Outcome::Stored(StoredResponse {
        head: Bytes::from_static(b"head"),
        body: Bytes::from_static(b"body"),
    })
}

async fn granted(store: &impl Store, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("{other:?}"),
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Claim,
    Complete,
    Peek,
    Release,
    Renew,
    Resolve,
}

impl Operation {
    pub const ALL: [Self; 6] = [
        Self::Claim,
        Self::Complete,
        Self::Peek,
        Self::Release,
        Self::Renew,
        Self::Resolve,
    ];

    /// Runs the operation through the proxy while `cut` takes effect. Then checks the record
    /// directly and repeats the operation as the layer does. Returns whether the reply arrived.
    async fn survive<S: Store>(self, proxied: &S, direct: &S, cut: impl FnOnce() + Send) -> bool {
        let claim = fresh();
        let key = &claim.key;
        match self {
            Self::Claim => survive_claim(&claim, proxied, direct, cut).await,
            Self::Complete => survive_complete(&claim, proxied, direct, cut).await,
            Self::Peek => {
                let owner = granted(direct, &claim).await.owner;
                cut();
                let peeked = judged(proxied.peek(key).await);
                if let Some(snapshot) = &peeked {
                    assert_eq!(snapshot.as_ref().unwrap().fence, owner.fence);
                }
                peeked.is_some()
            }
            Self::Release => {
                let owner = granted(direct, &claim).await.owner;
                cut();
                let released = judged(proxied.release(key, owner).await);
                assert_eq!(direct.release(key, owner).await.unwrap(), Release::Released);
                assert_eq!(direct.peek(key).await.unwrap(), None);
                released.is_some()
            }
            Self::Renew => {
                let owner = granted(direct, &claim).await.owner;
                cut();
                let renewed = judged(proxied.renew(key, owner, HOUR).await);
                assert_eq!(direct.renew(key, owner, HOUR).await.unwrap(), Renewal::Renewed);
                renewed.is_some()
            }
            Self::Resolve => {
                let owner = granted(direct, &claim).await.owner;
                direct.renew(key, owner, Duration::ZERO).await.unwrap();
                let found = Resolution::Completed(outcome(), HOUR);
                cut();
                let resolved = judged(proxied.resolve(key, owner.fence, &found).await);
                let repeated = direct.resolve(key, owner.fence, &found).await.unwrap();
                assert!(matches!(
                    repeated,
                    ResolveResult::Resolved | ResolveResult::Conflict(Some(_))
                ));
                let replay = direct
                    .claim(&Claim {
                        nonce: Nonce::random(),
                        ..claim
                    })
                    .await
                    .unwrap();
                assert!(matches!(replay, Decision::Replay(_)));
                resolved.is_some()
            }
        }
    }
}

async fn survive_claim<S: Store>(claim: &Claim, proxied: &S, direct: &S, cut: impl FnOnce() + Send) -> bool {
    cut();
    let first = judged(proxied.claim(claim).await);
    let repeated = granted(direct, claim).await;
    assert_eq!(repeated.attempt, 1);
    if let Some(first) = &first {
        assert_eq!(*first, Decision::Execute(repeated));
    }
    assert!(matches!(
        direct
            .claim(&Claim {
                nonce: Nonce::random(),
                ..claim.clone()
            })
            .await
            .unwrap(),
        Decision::Wait { .. }
    ));
    first.is_some()
}

async fn survive_complete<S: Store>(claim: &Claim, proxied: &S, direct: &S, cut: impl FnOnce() + Send) -> bool {
    let owner = granted(direct, claim).await.owner;
    cut();
    let completed = judged(proxied.complete(&claim.key, owner, &outcome(), HOUR).await);
    let repeated = direct.complete(&claim.key, owner, &outcome(), HOUR).await.unwrap();
    assert_eq!(repeated, Completion::Completed);
    let replay = direct
        .claim(&Claim {
            nonce: Nonce::random(),
            ..claim.clone()
        })
        .await
        .unwrap();
    assert!(matches!(replay, Decision::Replay(response) if Outcome::Stored(response.clone()) == outcome()));
    completed.is_some()
}

/// Returns the reply, or nothing if the store is unreachable. Panics on any other error.
fn judged<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error:?}");
            None
        }
    }
}

/// The positions of the cuts.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    /// Whether the same operation opens the connection, so that its statement is prepared.
    /// Otherwise another operation opens it.
    prepared: bool,
    first: usize,
    step: usize,
}

/// The distance between two cuts in bytes, unless the tests are thorough. It is a prime, so that
/// the cuts fall on every part of a frame.
const SAMPLE: usize = 11;

/// Cuts every operation after every byte in both directions, or after every eleventh byte if the
/// tests are not thorough. Returns the number of bytes that this covers.
///
/// Reconnecting takes most of the time. Therefore several stores, each behind its own proxy, share
/// the bytes.
pub async fn cut_after_every_byte<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S) -> usize {
    cut_everywhere(proxied, direct, true, 1).await
}

/// Cuts every operation in both directions while it is the first of its kind on its connection,
/// which makes it send more bytes. Cuts after every fifth byte, or after every 55th if the tests
/// are not thorough. Returns the number of cuts, scaled up to a thorough run.
pub async fn cut_while_preparing<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S) -> usize {
    cut_everywhere(proxied, direct, false, 5).await
}

async fn cut_everywhere<S: Store + Clone>(proxied: Vec<(S, Proxy)>, direct: &S, prepared: bool, step: usize) -> usize {
    let stores = proxied.len();
    let sample = if super::is_thorough() { 1 } else { SAMPLE };
    let step = step * sample;
    let shares = proxied.into_iter().enumerate().map(|(share, (store, proxy))| {
        let direct = direct.clone();
        let cuts = Cuts {
            prepared,
            // A cut before the first byte is the same as a cut after zero bytes.
            first: 1 + share * step,
            step: stores * step,
        };
        tokio::spawn(async move {
            let mut made = 0;
            for operation in Operation::ALL {
                for direction in [Direction::ToServer, Direction::ToClient] {
                    made += cut(operation, direction, cuts, (&store, &proxy), &direct).await;
                }
            }
            made
        })
    });
    let made = futures::future::join_all(shares.collect::<Vec<_>>()).await;
    sample * made.into_iter().map(Result::unwrap).sum::<usize>()
}

/// Cuts the operation at each position until it has no more bytes. Returns the number of cuts.
async fn cut<S: Store>(
    operation: Operation,
    direction: Direction,
    cuts: Cuts,
    (proxied, proxy): (&S, &Proxy),
    direct: &S,
) -> usize {
    let before = match operation {
        _ if cuts.prepared => operation,
        Operation::Peek => Operation::Renew,
        _ => Operation::Peek,
    };
    for (made, bytes) in (cuts.first..).step_by(cuts.step).enumerate() {
        let mut tries = 0;
        let is_over = loop {
            connected(before, proxied, direct).await;
            let cut = || proxy.set(Fate::CutAfter(direction, bytes));
            let has_reply = operation.survive(proxied, direct, cut).await;
            let was_cut = proxy.heal();
            if was_cut || has_reply {
                break !was_cut;
            }
            // The operation failed before it had sent this many bytes, because the machine is busy.
            tries += 1;
            assert!(tries < 20, "{operation:?} fails without a cut");
        };
        if is_over {
            assert!(bytes > 10, "{operation:?} sends nothing");
            return made;
        }
    }
    unreachable!()
}

/// Reconnects and runs an operation.
async fn connected<S: Store>(operation: Operation, proxied: &S, direct: &S) {
    for _ in 0..100 {
        if operation.survive(proxied, direct, || {}).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("the store does not reconnect");
}
